"""Draws a map of placements; needs matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from twotower.planner.placement_map import MODES, Mode, Panel, PlacementMap, Point
from twotower.towers.errors import ConfigError

FORMATS = ("svg", "png")
_FILLS: dict[Mode, str] = {
    "ar": "#d9d9d9",
    "lookup": "#bdb2d9",
    "verified": "#f2b8b5",
    "colocated": "#a8d5ba",
    "1:1": "#ffe39f",
    "1:N": "#a9cbe8",
}
_NAMES: dict[Mode, str] = {
    "ar": "ar",
    "lookup": "ar with lookups",
    "verified": "verified",
    "colocated": "diffusion, both towers on a GPU",
    "1:1": "diffusion, 1:1",
    "1:N": "diffusion, 1:N, best N",
}
# Break-even lines that are drawn, with their style.
_STYLES: dict[str, tuple[str, str]] = {
    "diffusion = ar": ("black", "-"),
    "diffusion = lookups": ("#5a3fa0", "-"),
    "verified = lookups": ("#a3150f", "--"),
    "1:1 = ar": ("#7a4b00", "--"),
    "1:N = ar": ("#0b4f8a", "-."),
    "verified = ar": ("#a3150f", ":"),
    "colocated = 1:1": ("#0a6b35", "--"),
    "1:N = colocated": ("#5b2a86", "-."),
}
# Of the filling, between cells along the axis of tokens.
_FINE = 240
_DPI = 130
_MEANING = """
Tokens per pass: of diffusion, tokens that a denoiser pass commits in the mean (an extension a block
comes on top, uncounted); of verified, tokens that a cycle of one denoiser pass and one check
yields; ar and ar with lookups do not depend on it. Lines: the number from which on the first is
ahead. Continuous batching. Between measured rows the ratio of measured to modelled passes is
interpolated over the logarithm of the rows; beyond them the nearest ratio holds (assumed). ar,
lookups and verified give the same text, diffusion another of other quality. Known tokens per pass
named drafts are those of cycles of other models than the 30B.
"""


def check_picture(path: Path) -> None:
    """Raises ConfigError for a file that is not to be drawn, and without matplotlib, before
    anything is computed."""
    kind = path.suffix.removeprefix(".")
    if kind not in FORMATS:
        raise ConfigError(f"map: got {path.name!r}, expected a file of .svg or .png")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"map: got {str(path)!r}, expected a file in a folder that exists")
    try:
        import_module("matplotlib")
    except ImportError:
        raise ConfigError("map: needs matplotlib; pip install 'twotower[bench]'") from None


def draw(placements: PlacementMap, path: Path) -> None:
    """Writes the picture, a panel for each format of the experts. The same map gives the same
    bytes. Raises ConfigError as `check_picture` does, and OSError."""
    check_picture(path)
    matplotlib = import_module("matplotlib")
    # A backend that needs no display, and ids that do not change.
    matplotlib.use("agg")
    pyplot = import_module("matplotlib.pyplot")
    with matplotlib.rc_context({"svg.hashsalt": "twotower", "hatch.linewidth": 0.6}):
        count = len(placements.panels)
        alone = count == 1
        size = (8.6, 8.2) if alone else (13.4, 7.0)
        figure, axes = pyplot.subplots(1, count, figsize=size, squeeze=False, sharey=True)
        for place, (panel, own) in enumerate(zip(placements.panels, axes[0], strict=True)):
            _draw_panel(own, panel, placements, last=place == count - 1)
        axes[0][0].set_ylabel("tokens per pass")
        _legend(figure, axes[0], placements)
        figure.suptitle(_title(placements), fontsize=12)
        figure.text(0.01, 0.008, _caption(placements), fontsize=7.5, va="bottom")
        left, bottom, right = (0.08, 0.35, 0.81) if alone else (0.055, 0.31, 0.885)
        figure.subplots_adjust(left, bottom, right, 0.9, wspace=0.05)
        kind = path.suffix.removeprefix(".")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(path, dpi=_DPI, format=kind, metadata=metadata)
        pyplot.close(figure)


def _draw_panel(axes: Any, panel: Panel, placements: PlacementMap, *, last: bool) -> None:
    places = range(len(panel.batches))
    low, high = panel.tokens[0], panel.tokens[-1]
    _fill(axes, panel)
    _contours(axes, panel)
    for line, (color, style) in _STYLES.items():
        crossings = [panel.crossing(line, column).tokens for column in places]
        if any(each is not None for each in crossings):
            heights = [math.nan if each is None else each for each in crossings]
            axes.plot(places, heights, style, color=color, linewidth=1.8)
    for point in _drawn(placements):
        if low <= point.tokens <= high:
            axes.axhline(point.tokens, color="#444444", linewidth=0.5, linestyle=(0, (1, 3)))
            axes.plot([-0.5], [point.tokens], marker=">", color="black", clip_on=False)
    if last:
        _name_points(axes, placements, low, high)
    _measured(axes, panel)
    axes.set(
        title="bf16" if panel.experts == "full" else "8-bit experts",
        xlabel="rows at a time of a denoiser (ar: of a GPU)",
        xlim=(-0.5, len(panel.batches) - 0.5),
        ylim=(low, high),
    )
    axes.set_xticks(list(places), [str(batch) for batch in panel.batches])


def _fill(axes: Any, panel: Panel) -> None:
    """A column for each batch, in runs of one placement from below; hatched where nothing fits."""
    low, high = panel.tokens[0], panel.tokens[-1]
    heights = [low + (high - low) * (place + 0.5) / _FINE for place in range(_FINE)]
    size = (high - low) / _FINE
    for column in range(len(panel.batches)):
        best = [panel.fastest(MODES, column, height) for height in heights]
        start = 0
        for end in range(1, _FINE + 1):
            if end < _FINE and best[end] == best[start]:
                continue
            mode, bottom, tall = best[start], low + start * size, (end - start) * size
            if mode is None:
                axes.bar(column, tall, 1, bottom, color="white", edgecolor="#888888", hatch="///")
                axes.text(column, bottom + tall / 2, "nothing fits", rotation=90, ha="center")
            else:
                axes.bar(column, tall, 1, bottom, color=_FILLS[mode], linewidth=0)
            start = end


def _contours(axes: Any, panel: Panel) -> None:
    """Lines of equal tokens/s per GPU of the best placement, where there are any."""
    best = [
        [cell.per_gpu(cell.best) if cell.best else math.nan for cell in row] for row in panel.cells
    ]
    known = [each for row in best for each in row if each == each]
    levels = [
        mantissa * 10**power
        for power in range(8)
        for mantissa in (1, 2, 5)
        if known and min(known) < mantissa * 10**power < max(known)
    ]
    if levels and min(len(panel.batches), len(panel.tokens)) > 1:
        columns = range(len(panel.batches))
        lines = axes.contour(columns, panel.tokens, best, levels, colors="#555555", linewidths=0.8)
        axes.clabel(lines, fmt="%d", fontsize=8)


def _measured(axes: Any, panel: Panel) -> None:
    """Marks below the axis at batches whose passes of both towers were measured, and a line beyond
    the last of them."""
    kinds = ("ar", "denoise", "extend")
    places = [
        column
        for column in range(len(panel.batches))
        if all(panel.basis[kind][column] == "measured" for kind in kinds)  # type: ignore[index]
    ]
    if not places:
        axes.text(0, 1.005, "no pass measured", transform=axes.transAxes, fontsize=8)
        return
    low = panel.tokens[0]
    axes.plot(places, [low] * len(places), "^", color="black", markersize=9, clip_on=False)
    if places[-1] < len(panel.batches) - 1:
        axes.axvline(places[-1] + 0.5, color="black", linewidth=0.8, linestyle=(0, (6, 4)))
        axes.text(
            places[-1] + 0.56, panel.tokens[-1], "not measured", rotation=90, fontsize=8, va="top"
        )


def _drawn(placements: PlacementMap) -> list[Point]:
    """The points of what depends on the axis of tokens: lookups do not."""
    return [point for point in placements.points if point.decoding != "lookup"]


def _name_points(axes: Any, placements: PlacementMap, low: float, high: float) -> None:
    """Names of known points, right of the last panel, pushed apart where they are close."""
    least = (high - low) / 34
    at = low - least
    for point in sorted(_drawn(placements), key=lambda each: each.tokens):
        if low <= point.tokens <= high:
            at = max(at + least, point.tokens)
            axes.annotate(
                f"{point.name} {point.tokens:.2f}",
                (1.0, point.tokens),
                (1.015, at),
                xycoords=("axes fraction", "data"),
                textcoords=("axes fraction", "data"),
                fontsize=8,
                va="center",
                annotation_clip=False,
            )


def _legend(figure: Any, axes: Any, placements: PlacementMap) -> None:
    panels, lookup_tokens = placements.panels, placements.question.lookup_tokens
    patches, lines = import_module("matplotlib.patches"), import_module("matplotlib.lines")
    handles = [
        patches.Patch(color=_FILLS[mode], label=_named(mode, panels, lookup_tokens))
        for mode in MODES
    ]
    hatched = {"facecolor": "white", "edgecolor": "#888888", "hatch": "///"}
    handles.append(patches.Patch(**hatched, label="nothing fits"))
    drawn = {(line.get_color(), line.get_linestyle()) for own in axes for line in own.get_lines()}
    for name, (color, style) in _STYLES.items():
        if (color, style) in drawn:
            handles.append(lines.Line2D([], [], color=color, linestyle=style, label=name))
    mark = {"color": "black", "linestyle": "none"}
    handles += [
        lines.Line2D([], [], color="#555555", linewidth=0.8, label="tokens/s per GPU of the best"),
        lines.Line2D([], [], marker="^", **mark, label="passes measured at so many rows"),
        lines.Line2D([], [], marker=">", **mark, label="known tokens per pass"),
    ]
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=3 if len(panels) == 1 else 5,
        fontsize=8,
        frameon=False,
        bbox_to_anchor=(0.5, 0.125),
    )


def _named(mode: Mode, panels: Sequence[Panel], lookup_tokens: float) -> str:
    """The mode's name in the legend, with a word where it is ahead of all others nowhere."""
    cells = [cell for panel in panels for row in panel.cells for cell in row]
    name = _NAMES[mode]
    if mode == "lookup":
        name += f", {lookup_tokens:g} tokens a round"
    return name + ("" if any(cell.best == mode for cell in cells) else " (nowhere first)")


def _title(placements: PlacementMap) -> str:
    asked = placements.question
    prompts = "decoding alone"
    if asked.output_tokens is not None:
        prompts = f"{asked.output_tokens} of them output"
    return f"Most tokens/s per GPU: {asked.gpu.upper()}, rows of {asked.context} tokens, {prompts}"


def _caption(placements: PlacementMap) -> str:
    """What the axes mean, and what is measured, of a datasheet or assumed."""
    inputs = {
        basis: ", ".join(dict.fromkeys(own.name for own in placements.inputs if own.basis == basis))
        for basis in ("measured", "datasheet", "derived", "assumed", "given")
    }
    bases = "; ".join(f"{basis}: {names}" for basis, names in inputs.items() if names)
    width = 140 if len(placements.panels) == 1 else 220
    texts = (_MEANING.strip(), f"Inputs, {bases}.")
    return "\n".join(textwrap.fill(text, width) for text in texts)
