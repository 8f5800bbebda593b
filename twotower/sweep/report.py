"""The report of a sweep: `sweep.csv`, `sweep.json` and a table in markdown."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from twotower.bench.hardware import hardware
from twotower.sweep.costs import PassCosts
from twotower.sweep.folder import SweepFolder
from twotower.sweep.grid import AR
from twotower.sweep.run import Sweep

Line = dict[str, Any]
CSV, JSON = "sweep.csv", "sweep.json"
_DIGITS = 6


def lines(sweep: Sweep, costs: PassCosts | None = None) -> list[Line]:
    """The points, each with its speed-up over ar at these costs of passes (None: the sweep's)."""
    ar = next(point for point in sweep.points if point["name"] == AR)
    known = costs or sweep.costs
    return [
        {name: _rounded(value) for name, value in point.items() if name != "of"}
        | {"speedup": _rounded(known.speedup(point, ar))}
        for point in sweep.points
    ]


def write_report(sweep: Sweep, folder: SweepFolder) -> None:
    """Writes both files; each is replaced as a whole."""
    points = lines(sweep)
    folder.write(CSV, to_csv(points))
    folder.write(JSON, json.dumps(to_dict(sweep, points), indent=2, allow_nan=False) + "\n")


def to_csv(points: Sequence[Line]) -> str:
    """A header and a line for each point; what a point does not have stays empty."""
    names = list(dict.fromkeys(name for point in points for name in point))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    return text.getvalue()


def to_dict(sweep: Sweep, points: Sequence[Line]) -> dict[str, Any]:
    """Everything, for JSON: settings, machine, costs of passes and points."""
    device = torch.device(str(sweep.identity["device"]))
    return {
        "settings": dict(sweep.identity),
        "machine": hardware(device),
        "pass_costs": sweep.costs.to_dict(),
        "points": list(points),
    }


def markdown(sweep: Sweep) -> str:
    """The table of a sweep, with its costs of passes below."""
    points = lines(sweep)
    scores = [name for name in points[0] if name.startswith("score_")]
    columns = [*_COLUMNS, *(name.removeprefix("score_").replace("_", " ") for name in scores)]
    table = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for point in points:
        cells = [*_cells(point), *(f"{point[name]:.3f}" for name in scores)]
        table.append(f"| {' | '.join(cells)} |")
    return "\n".join([*table, "", _costs_line(sweep.costs)])


_COLUMNS = (
    "point",
    "tokens a pass",
    "fresh",
    "tokens/NFE",
    "loss over `ar`, nats (95 %)",
    "relative",
    "novel loss",
    "regret",
    "equals greedy `ar`: tokens (95 %); rows",
    "repeats",
    "tokens/s here",
    "speed-up over `ar`",
)


def _cells(point: Mapping[str, Any]) -> list[str]:
    loss = f"{point['loss']:.3f} ({point['loss_low']:.3f} to {point['loss_high']:.3f})"
    agreement = (
        f"{point['agreement']:.3f} ({point['agreement_low']:.3f} to "
        f"{point['agreement_high']:.3f}); {point['exact_share']:.3f}"
    )
    return [
        str(point["name"]),
        f"{point['tokens_per_pass']:.2f}",
        _or_dash(point.get("fresh_tokens_per_pass")),
        _or_dash(point["tokens_per_nfe"]),
        loss,
        f"{point['relative_quality']:.1%}",
        f"{point['novel_loss']:.3f}",
        _or_dash(point.get("regret"), 3),
        agreement,
        f"{point['repeated_share']:.2f}",
        f"{point['tokens_per_s']:.0f}",
        _or_dash(point["speedup"]),
    ]


def _costs_line(costs: PassCosts) -> str:
    blocks = "; ".join(
        f"block {size}: {', '.join(f'{kind} {value:.1f}' for kind, value in ms.items())}"
        for size, ms in sorted(costs.blocks.items())
    )
    return (
        f"Speed-up at these ms a pass of {costs.rows:g} rows ({costs.source}): "
        f"ar {costs.ar:.1f}; {blocks}."
    )


def _or_dash(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _rounded(value: Any) -> Any:
    # Never -0.0, which a table would show.
    return round(value, _DIGITS) + 0.0 if isinstance(value, float) else value
