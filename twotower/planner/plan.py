"""A plan: estimates of all placements, and the figures that they rest on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from twotower.planner import commits
from twotower.planner.devices import HOPPER_FP8, Device, device_named
from twotower.planner.drafts import CYCLE_TOKENS, LOOKUP_TOKENS
from twotower.planner.estimates import Estimate, Estimator, PassTimes
from twotower.planner.gpu_memory import RUNTIME_BYTES, STATE_SHARE
from twotower.planner.measured import MeasuredPasses, by_format
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
    measured: Sequence[MeasuredPasses] = (),
    reached: Reached | None = None,
) -> Plan:
    """Answers a question. Raises ConfigError, with the arithmetic, if nothing fits, and for reports
    that cannot be merged."""
    device = device_named(question.gpu)
    reached = reached or reached_on(device)
    known = by_format(measured)
    formats = planned_formats(question, config, known)
    config = replace(config, quantized_experts=False)
    estimates: list[Estimate] = []
    times = []
    for experts in formats:
        estimator = Estimator(question, config, experts, known.get(experts), reached)
        estimates += estimator.estimates()
        times.append(estimator.times())
    fitting = [estimate for estimate in estimates if estimate.fits]
    if not fitting:
        sums = {gpu.arithmetic() for each in estimates for gpu in each.memory if not gpu.fits}
        raise ConfigError("nothing fits: " + "; ".join(sorted(sums)))
    return Plan(
        question,
        question.steps,
        tuple(inputs_of(question, known, reached)),
        tuple(times),
        tuple(estimates),
        {experts: _best_denoisers(fitting, experts) for experts in formats},
        max(fitting, key=lambda estimate: estimate.per_gpu),
    )


def reached_on(device: Device) -> Reached:
    """What kernels are taken to reach on a device."""
    return Reached(fp8=device.fp8_reach or 1.0)


def planned_formats(
    question: Question, config: TwoTowerConfig, measured: Mapping[Experts, MeasuredPasses]
) -> tuple[Experts, ...]:
    """Formats of the experts that are asked for, stored and, if any is, measured. Raises
    ConfigError if there is none."""
    stored = question.experts
    if config.quantized_experts:
        stored = tuple(name for name in stored if name == "fp8")
    if measured:
        stored = tuple(name for name in stored if name in measured)
    if not stored:
        raise ConfigError(
            f"experts: got {', '.join(question.experts)}, expected the format of the checkpoint "
            "and of what was measured"
        )
    return stored


def _best_denoisers(fitting: Sequence[Estimate], experts: Experts) -> int | None:
    best: Estimate | None = None
    for estimate in fitting:
        if estimate.experts != experts or estimate.decoding != "mask_diffusion":
            continue
        if estimate.colocated:
            continue
        if best is None or estimate.per_gpu > (1 + _WORTH) * best.per_gpu:
            best = estimate
    return best.denoisers if best else None


def inputs_of(
    question: Question, measured: Mapping[Experts, MeasuredPasses], reached: Reached
) -> Iterator[Input]:
    """The figures that estimates rest on."""
    device = device_named(question.gpu)
    yield Input("memory", f"{device.memory_bytes} bytes", "datasheet", device.source)
    yield _ceilings_input(device, measured)
    yield _steps_input(question)
    yield from _drafts_inputs(question)
    # Stats of a pair are those of both formats.
    sources = {known.source: ", ".join(sorted(known.seconds)) for known in measured.values()}
    for source, kinds in sources.items():
        yield Input("passes", kinds, "measured", source)
    if "fp8" in question.experts and "fp8" not in measured:
        yield _fp8_input(device, reached)
    yield from _measured_ratios(measured)
    shares = (
        f"{reached.bandwidth:g} of the bandwidth, {reached.flops:g} of the rates, "
        f"{1e6 * reached.launch_s:g} us a launch"
    )
    where = "all other passes" if measured else "all passes"
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


def _fp8_input(device: Device, reached: Reached) -> Input:
    """What is taken of experts in 8 bits where no pass with them was measured."""
    value = f"{reached.fp8:g} of what bf16 experts reach"
    if device.fp8_reach is None or reached.fp8 != device.fp8_reach:
        return Input(
            "8-bit experts",
            value,
            "assumed",
            f"their bytes alone; a measurement contradicts it: on an H200 it was {HOPPER_FP8:g}",
        )
    basis: Basis = "measured" if device.measured is not None else "assumed"
    return Input("8-bit experts", value, basis, device.fp8_source)


def _measured_ratios(measured: Mapping[Experts, MeasuredPasses]) -> Iterator[Input]:
    """What reports say of 8-bit experts beside bf16, and of verified cycles beside their passes."""
    if len({known.source for known in measured.values()}) > 1:
        full, fp8 = measured["full"].seconds, measured["fp8"].seconds
        times = {(kind, rows): seconds for kind in full for rows, seconds in full[kind]}
        ratios = [
            seconds / times[kind, rows]
            for kind in fp8
            for rows, seconds in fp8[kind]
            if (kind, rows) in times
        ]
        if ratios:
            value = f"{min(ratios):.2f} to {max(ratios):.2f} of a pass in bf16"
            yield Input("8-bit experts", value, "measured", f"{len(ratios)} passes of both formats")
    cycles = next((known.cycles for known in measured.values() if known.cycles), ())
    for rows, ratio in cycles:
        value = f"{ratio:.2f} of their two passes"
        yield Input("verified cycles", value, "measured", f"{rows:g} rows, taken for all")


def _ceilings_input(device: Device, measured: Mapping[Experts, MeasuredPasses]) -> Input:
    ceilings, source = device.ceilings(), device.ceilings_source()
    basis: Basis = "derived" if device.measured is None else "measured"
    for known in measured.values():
        if known.ceilings is not None:
            ceilings, basis, source = known.ceilings, "measured", known.source
            break
    rates = f"{ceilings.bytes_per_s / 1e12:.3g} TB/s, {ceilings.matmul_flops / 1e12:.3g} TFLOP/s"
    return Input("ceilings", rates, basis, source)


def _drafts_inputs(question: Question) -> Iterator[Input]:
    """What checked drafts are taken to yield. No 30B model has been measured with either."""
    value = f"{question.lookup_tokens:g} tokens a round with drafts of {BLOCK - 1}"
    if question.lookup_tokens == LOOKUP_TOKENS:
        where = "as the shipped 10M model at temperature 0.7; it gave 2.2 to 3.3 greedy, in loops"
        yield Input("lookups", value, "assumed", where)
    else:
        yield Input("lookups", value, "given", "lookup_tokens")
    value = "a constant chance of every drafted token; all rows of a pass as long as the longest"
    yield Input("shorter lookups", value, "assumed", "the length that pays most is taken")
    value = f"{question.cycle_tokens:g} tokens a cycle"
    if question.cycle_tokens == CYCLE_TOKENS:
        where = "as the shipped 10M model, greedy; published drafters of others reach 5.5 to 6.8"
        yield Input("checked drafts", value, "assumed", where)
    else:
        yield Input("checked drafts", value, "given", "cycle_tokens")


def _steps_input(question: Question) -> Input:
    value = f"{BLOCK / question.steps:.3g} tokens a pass, {question.steps:.3g} passes a block"
    if question.tokens_per_nfe is not None:
        return Input("commits", value, "given", "tokens_per_nfe")
    text = commits.TEXTS[question.text]
    source = f"threshold {question.gamma:g}, {text}; public reproduction of the 30B model"
    return Input("commits", value, "measured", source)
