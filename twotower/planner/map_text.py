"""Shows a map of placements: as text for a terminal, or as one JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from twotower.planner.placement_map import LINES, MODES, Cell, Crossing, Mode, Panel, PlacementMap
from twotower.planner.text import EXPERTS, inputs_table, table

TOKENS_MEAN = {
    "ar": "no meaning: always one token a pass and row",
    "lookup": (
        "no meaning: a round of lookups, one pass of the context tower alone, yields what the "
        "question says"
    ),
    "1:1, 1:N, colocated": (
        "tokens that a denoiser pass commits in the mean; a block of 16 takes 16 over that many of "
        "them, and one extension besides, which does not count"
    ),
    "verified": (
        "tokens that a cycle yields in the mean; a cycle is one denoiser pass, which drafts, and "
        "one pass of the context tower, which checks and draws the last token"
    ),
}
ROWS_MEAN = "rows at a time of each denoiser, and of each GPU of ar"
PASS_BASIS = {
    "measured": "measured with so many rows",
    "extension": "a verification by the ratio of measured to modelled extensions of so many rows",
    "between": "between measured numbers of rows: the modelled time by the ratio of measured to "
    "modelled ones, linear over the logarithm of the rows",
    "beyond": "beyond measured numbers of rows: by the nearest one's ratio",
    "modelled": "not measured: floors at the shares that kernels are taken to reach (assumed)",
}


def to_dict(placements: PlacementMap) -> dict[str, Any]:
    """The whole grid, ready for JSON: grids are lists by tokens per pass of lists by batch."""
    asked = placements.question
    return {
        "gpu": asked.gpu,
        "context": asked.context,
        "output_tokens": asked.output_tokens,
        "lookup_tokens": asked.lookup_tokens,
        "most_denoisers": asked.most_denoisers,
        "tokens_per_pass_mean": TOKENS_MEAN,
        "batches_mean": ROWS_MEAN,
        "pass_basis_mean": PASS_BASIS,
        "panels": [_panel(panel) for panel in placements.panels],
        "diffusion_equals_ar_in_either_format": [
            asdict(placements.crossing(column))
            for column in range(len(placements.panels[0].batches))
        ],
        "points": [asdict(point) for point in placements.points],
        "inputs": [asdict(given) for given in placements.inputs],
    }


def to_text(placements: PlacementMap) -> str:
    """Break-even tables and best placements by batch, and inputs with their sources."""
    asked = placements.question
    prompts = "decoding alone"
    if asked.output_tokens is not None:
        prompts = f"{asked.output_tokens} of them output, the rest a prompt that is read"
    parts = [f"{asked.gpu}, tokens of a row: {asked.context}, {prompts}"]
    for panel in placements.panels:
        parts += [_crossings(panel), _bases(panel)]
    if len(placements.panels) > 1:
        parts.append(_either(placements))
    meanings = [f"{modes}: {meaning}" for modes, meaning in TOKENS_MEAN.items()]
    parts.append("tokens per pass\n" + "\n".join(meanings) + f"\nrows: {ROWS_MEAN}")
    points = [
        [point.name, point.decoding, f"{point.tokens:.2f}", point.source]
        for point in placements.points
    ]
    parts.append(table(["known point", "of", "tokens a pass", "source"], points))
    parts.append(inputs_table(placements.inputs))
    return "\n\n".join(parts)


def shown(crossing: Crossing) -> str:
    """A crossing as a cell of a table."""
    return f"{crossing.tokens:.2f}" if crossing.tokens is not None else crossing.says


def _panel(panel: Panel) -> dict[str, Any]:
    columns = range(len(panel.batches))
    return {
        "experts": panel.experts,
        "batches": panel.batches,
        "tokens_per_pass": panel.tokens,
        "best": [[cell.best for cell in row] for row in panel.cells],
        "tokens_per_s_per_gpu": {mode: _grid(panel, mode) for mode in MODES},
        "placements": {mode: _names(panel, mode) for mode in MODES},
        "break_even": {
            line: [asdict(panel.crossing(line, column)) for column in columns] for line in LINES
        },
        "lookups_equal_ar": [asdict(panel.lookups(column)) for column in columns],
        "passes": panel.basis,
    }


def _grid(panel: Panel, mode: Mode) -> list[list[float | None]]:
    return [[cell.per_gpu(mode) or None for cell in row] for row in panel.cells]


def _names(panel: Panel, mode: Mode) -> list[list[str | None]]:
    return [[_name(cell, mode) for cell in row] for row in panel.cells]


def _name(cell: Cell, mode: Mode) -> str | None:
    return cell.fastest[mode].name if mode in cell.fastest else None


def _crossings(panel: Panel) -> str:
    """Tokens per pass at which two are equal, the fastest at both ends of the axis, and their
    speeds, by batch."""
    columns = range(len(panel.batches))
    head = [EXPERTS[panel.experts], *(f"{batch} rows" for batch in panel.batches)]
    rows = [[line, *(shown(panel.crossing(line, at)) for at in columns)] for line in LINES]
    rows.append(["lookups = ar, tokens a round", *(shown(panel.lookups(at)) for at in columns)])
    for place in (0, len(panel.tokens) - 1):
        best = [_best(panel.cells[place][at]) for at in columns]
        rows.append([f"best at {panel.tokens[place]:g}", *best])
    return "tokens a pass from which on the first is ahead\n" + table(head, rows)


def _either(placements: PlacementMap) -> str:
    batches = placements.panels[0].batches
    head = ["either format", *(f"{batch} rows" for batch in batches)]
    row = [shown(placements.crossing(column)) for column in range(len(batches))]
    return table(head, [["diffusion = ar", *row]])


def _best(cell: Cell) -> str:
    mode = cell.best
    return f"{cell.fastest[mode].name} {cell.per_gpu(mode):.0f}" if mode else "nothing fits"


def _bases(panel: Panel) -> str:
    rows: Sequence[Sequence[str]] = [[kind, *basis] for kind, basis in panel.basis.items()]
    return table(["passes", *(f"{batch} rows" for batch in panel.batches)], rows)
