"""A plan: estimates of all placements, and the figures that they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from twotower.planner import commits
from twotower.planner.devices import Device, device_named
from twotower.planner.estimates import Estimate, Estimator, PassTimes
from twotower.planner.gpu_memory import RUNTIME_BYTES, STATE_SHARE
from twotower.planner.measured import MeasuredPasses
from twotower.planner.passes import TEXT_DRAWS, Reached
from twotower.planner.question import Experts, Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

Basis = Literal["measured", "datasheet", "derived", "assumed", "given"]
# Another denoiser must raise tokens/s per GPU by this share.
_WORTH = 0.01


@dataclass(frozen=True)
class Input:
    """A figure that a plan rests on, and where it comes from."""

    name: str
    value: str
    basis: Basis
    source: str


@dataclass(frozen=True)
class Plan:
    """Every estimate, the best number of denoisers per context tower by format of the experts (None
    if no pair fits), and the estimate with most tokens/s per GPU."""

    question: Question
    steps_per_block: float
    inputs: tuple[Input, ...]
    passes: tuple[PassTimes, ...]
    estimates: tuple[Estimate, ...]
    denoisers: dict[str, int | None]
    best: Estimate


def make_plan(
    question: Question,
    config: TwoTowerConfig = LARGE,
    measured: MeasuredPasses | None = None,
    reached: Reached | None = None,
) -> Plan:
    """Answers a question. Raises ConfigError, with the arithmetic, if nothing fits."""
    reached = reached or Reached()
    device = device_named(question.gpu)
    formats = _formats(question, config, measured)
    config = replace(config, quantized_experts=False)
    estimates: list[Estimate] = []
    times = []
    for experts in formats:
        estimator = Estimator(question, config, experts, measured, reached)
        estimates += estimator.estimates()
        times.append(estimator.times())
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        sums = {gpu.arithmetic() for each in estimates for gpu in each.memory if not gpu.fits}
        raise ConfigError("nothing fits: " + "; ".join(sorted(sums)))
    return Plan(
        question,
        question.steps,
        tuple(_inputs(question, device, measured, reached)),
        tuple(times),
        tuple(estimates),
        {experts: _best_denoisers(fitting, experts) for experts in formats},
        max(fitting, key=lambda estimate: estimate.per_gpu),
    )


def _formats(
    question: Question, config: TwoTowerConfig, measured: MeasuredPasses | None
) -> tuple[Experts, ...]:
    stored = question.experts
    if config.quantized_experts:
        stored = tuple(name for name in stored if name == "fp8")
    if measured is not None and measured.fp8 is not None:
        stored = tuple(name for name in stored if (name == "fp8") == measured.fp8)
    if not stored:
        raise ConfigError(
            f"experts: got {', '.join(question.experts)}, expected the format of the checkpoint "
            "and of what was measured"
        )
    return stored


def _best_denoisers(fitting: Sequence[Estimate], experts: Experts) -> int | None:
    best: Estimate | None = None
    for estimate in fitting:
        if estimate.experts != experts or estimate.colocated or not estimate.denoisers:
            continue
        if best is None or estimate.per_gpu > (1 + _WORTH) * best.per_gpu:
            best = estimate
    return best.denoisers if best else None


def _inputs(
    question: Question, device: Device, measured: MeasuredPasses | None, reached: Reached
) -> Iterator[Input]:
    yield Input("memory", f"{device.memory_bytes} bytes", "datasheet", device.source)
    yield _ceilings_input(device, measured)
    yield _steps_input(question)
    kinds = sorted(measured.seconds) if measured else []
    if measured is not None:
        yield Input("passes", ", ".join(kinds), "measured", measured.source)
    shares = (
        f"{reached.bandwidth:g} of the bandwidth, {reached.flops:g} of the rates, "
        f"{1e6 * reached.launch_s:g} us a launch"
    )
    where = "all other passes" if kinds else "all passes"
    yield Input("reached by kernels", shares, "assumed", where)
    yield Input(
        "unique experts",
        f"as of {TEXT_DRAWS:g} independent draws a block",
        "measured",
        "34 of 128 for one block of text, public reproduction; more rows choose independently",
    )
    runtime = f"{RUNTIME_BYTES} bytes beside; states take at most {STATE_SHARE:g} of what is left"
    yield Input("runtime", runtime, "assumed", "CUDA context, kernels, graphs, NCCL")
    yield Input(
        "links", "not the bottleneck", "assumed", "4.7 MB a row and block, NVLink or PCIe 5"
    )
    if question.output_tokens is None:
        yield Input("prompts", "not counted", "given", "decoding alone")


def _ceilings_input(device: Device, measured: MeasuredPasses | None) -> Input:
    ceilings, source = device.ceilings(), device.ceilings_source()
    basis: Basis = "derived" if device.measured is None else "measured"
    if measured is not None and measured.ceilings is not None:
        ceilings, basis, source = measured.ceilings, "measured", measured.source
    rates = f"{ceilings.bytes_per_s / 1e12:.3g} TB/s, {ceilings.matmul_flops / 1e12:.3g} TFLOP/s"
    return Input("ceilings", rates, basis, source)


def _steps_input(question: Question) -> Input:
    value = f"{BLOCK / question.steps:.3g} tokens a pass, {question.steps:.3g} passes a block"
    if question.tokens_per_nfe is not None:
        return Input("commits", value, "given", "tokens_per_nfe")
    text = commits.TEXTS[question.text]
    source = f"threshold {question.gamma:g}, {text}; public reproduction of the 30B model"
    return Input("commits", value, "measured", source)
