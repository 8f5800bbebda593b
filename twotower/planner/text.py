"""Shows a plan: as tables for a terminal, or as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twotower.planner.estimates import Decoding, Estimate
from twotower.planner.plan import Input, Plan

_GB = 1e9
# What a break-even counts.
_PER: dict[Decoding, str] = {
    "ar": "",
    "lookup": "tokens a round",
    "mask_diffusion": "tokens a pass",
    "verified": "tokens a cycle",
}
EXPERTS = {"full": "bf16", "fp8": "fp8 experts"}


def to_dict(plan: Plan) -> dict[str, Any]:
    """The whole plan, ready for JSON, with the properties that follow from its fields."""
    body = asdict(plan)
    body["estimates"] = [_estimate(estimate) for estimate in plan.estimates]
    body["best"] = _estimate(plan.best)
    return body


def to_text(plan: Plan) -> str:
    """The plan as text: question, speeds, placements that do not fit, advice, and inputs with their
    sources."""
    asked = plan.question
    head = (
        f"{asked.gpu}, rows of a denoiser: {asked.batch}, tokens of each: {asked.context}, "
        f"denoiser passes a block: {plan.steps_per_block:.3g}"
    )
    parts = [
        head,
        _passes(plan),
        _speeds(plan),
        _refused(plan),
        _advice(plan),
        inputs_table(plan.inputs),
    ]
    return "\n\n".join(part for part in parts if part)


def _estimate(estimate: Estimate) -> dict[str, Any]:
    memory = [{**asdict(gpu), "needed": gpu.needed, "fits": gpu.fits} for gpu in estimate.memory]
    plain = asdict(estimate)
    return {**plain, "memory": memory, "fits": estimate.fits, "per_gpu": estimate.per_gpu}


def _passes(plan: Plan) -> str:
    names = list(plan.passes[0].expected_ms)
    rows = [
        [EXPERTS[times.experts], *(_pair(times.expected_ms[n], times.floor_ms[n]) for n in names)]
        for times in plan.passes
    ]
    return table(["ms a pass (floor)", *names], rows)


def _pair(expected: float, floor: float) -> str:
    return f"{expected:.2f} ({floor:.2f})" if expected else "-"


def _speeds(plan: Plan) -> str:
    names = ["placement", "", "GPUs", "rows", "GB a GPU", "tokens/s", "per GPU", "over AR"]
    names += ["in step", "ceiling", "busy context, denoiser", "equals AR at"]
    return table(names, [_speed(estimate) for estimate in plan.estimates])


def _speed(estimate: Estimate) -> list[str]:
    needed = ", ".join(f"{part.needed / _GB:.1f}" for part in estimate.memory)
    first = [
        estimate.name,
        EXPERTS[estimate.experts],
        str(estimate.gpus),
        str(estimate.rows),
        needed,
    ]
    if not estimate.fits:
        return [*first, "does not fit"]
    return [
        *first,
        f"{estimate.tokens_per_s:.0f}",
        f"{estimate.per_gpu:.0f}",
        f"{estimate.over_ar:.2f}" if estimate.over_ar else "-",
        f"{estimate.in_step:.0f}",
        f"{estimate.ceiling:.0f}",
        f"{estimate.context_busy:.2f}, {estimate.denoiser_busy:.2f}" if estimate.denoisers else "-",
        _even(estimate),
    ]


def _even(estimate: Estimate) -> str:
    if estimate.break_even is None:
        return "-"
    return f"{estimate.break_even:.2f} {_PER[estimate.decoding]}"


def _refused(plan: Plan) -> str:
    sums = [gpu.arithmetic() for each in plan.estimates for gpu in each.memory if not gpu.fits]
    return "\n".join(dict.fromkeys(sums))


def _advice(plan: Plan) -> str:
    lines = []
    for experts, count in plan.denoisers.items():
        said = f"denoisers per context tower: {count}" if count else "no pair fits"
        lines.append(f"{EXPERTS[experts]}, {said}")
    best = plan.best
    lines.append(
        f"most tokens/s per GPU: {best.name} with {EXPERTS[best.experts]}, {best.per_gpu:.0f}"
    )
    return "\n".join(lines)


def inputs_table(inputs: Sequence[Input]) -> str:
    """Inputs with their sources, a line each."""
    rows = [[given.name, given.basis, given.value, given.source] for given in inputs]
    return table(["input", "basis", "value", "source"], rows)


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text in columns as wide as their widest cell; a row may have fewer cells."""
    lines = [list(names), *map(list, rows)]
    widths = [
        max(len(line[column]) for line in lines if column < len(line))
        for column in range(len(names))
    ]
    padded = [
        "  ".join(
            cell.ljust(widths[column]) if column < len(widths) else cell
            for column, cell in enumerate(line)
        ).rstrip()
        for line in lines
    ]
    return "\n".join(padded)
