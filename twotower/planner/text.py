"""A plan for readers: tables on a terminal, or one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twotower.planner.estimates import Estimate
from twotower.planner.plan import Plan

_GB = 1e9
_EXPERTS = {"full": "bf16", "fp8": "fp8 experts"}


def to_dict(plan: Plan) -> dict[str, Any]:
    """Everything, ready for JSON; what follows from other figures included."""
    body = asdict(plan)
    body["estimates"] = [_estimate(own) for own in plan.estimates]
    body["best"] = _estimate(plan.best)
    return body


def to_text(plan: Plan) -> str:
    """Question, speeds, what does not fit, advice, and the inputs with their sources."""
    own = plan.question
    head = (
        f"{own.gpu}, rows of a denoiser: {own.batch}, tokens of each: {own.context}, "
        f"denoiser passes a block: {plan.steps_per_block:.3g}"
    )
    parts = [head, _passes(plan), _speeds(plan), _refused(plan), _advice(plan), _inputs(plan)]
    return "\n\n".join(part for part in parts if part)


def _estimate(own: Estimate) -> dict[str, Any]:
    memory = [{**asdict(part), "needed": part.needed, "fits": part.fits} for part in own.memory]
    return {**asdict(own), "memory": memory, "fits": own.fits, "per_gpu": own.per_gpu}


def _passes(plan: Plan) -> str:
    names = list(plan.passes[0].expected_ms)
    rows = [
        [_EXPERTS[own.experts], *(_pair(own.expected_ms[n], own.floor_ms[n]) for n in names)]
        for own in plan.passes
    ]
    return _table(["ms a pass (floor)", *names], rows)


def _pair(expected: float, floor: float) -> str:
    return f"{expected:.2f} ({floor:.2f})" if expected else "-"


def _speeds(plan: Plan) -> str:
    names = ["placement", "", "GPUs", "rows", "GB a GPU", "tokens/s", "per GPU", "over AR"]
    names += ["in step", "ceiling", "busy context, denoiser", "equals AR at"]
    return _table(names, [_speed(own) for own in plan.estimates])


def _speed(own: Estimate) -> list[str]:
    needed = ", ".join(f"{part.needed / _GB:.1f}" for part in own.memory)
    first = [own.name, _EXPERTS[own.experts], str(own.gpus), str(own.rows), needed]
    if not own.fits:
        return [*first, "does not fit"]
    return [
        *first,
        f"{own.tokens_per_s:.0f}",
        f"{own.per_gpu:.0f}",
        f"{own.over_ar:.2f}" if own.over_ar else "-",
        f"{own.in_step:.0f}",
        f"{own.ceiling:.0f}",
        f"{own.context_busy:.2f}, {own.denoiser_busy:.2f}" if own.denoisers else "-",
        f"{own.break_even:.2f} tokens a pass" if own.break_even is not None else "-",
    ]


def _refused(plan: Plan) -> str:
    sums = [part.arithmetic() for own in plan.estimates for part in own.memory if not part.fits]
    return "\n".join(dict.fromkeys(sums))


def _advice(plan: Plan) -> str:
    lines = []
    for experts, count in plan.denoisers.items():
        said = f"denoisers per context tower: {count}" if count else "no pair fits"
        lines.append(f"{_EXPERTS[experts]}, {said}")
    best = plan.best
    lines.append(
        f"most tokens/s per GPU: {best.name} with {_EXPERTS[best.experts]}, {best.per_gpu:.0f}"
    )
    return "\n".join(lines)


def _inputs(plan: Plan) -> str:
    rows = [[own.name, own.basis, own.value, own.source] for own in plan.inputs]
    return _table(["input", "basis", "value", "source"], rows)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; a row may end early."""
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
