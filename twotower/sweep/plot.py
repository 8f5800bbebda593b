"""Plots a sweep: quality against tokens per pass; needs matplotlib, from the extra `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from math import exp
from pathlib import Path
from typing import Any

from twotower.sweep.grid import STRATEGIES, shown_value

Line = dict[str, Any]
SVG = "sweep.svg"
# The released 30B model at threshold 0.8, blocks of 16, two H100: its card and arXiv 2606.26493.
PUBLISHED_SPEEDUP, PUBLISHED_QUALITY = 2.42, 0.987
_PUBLISHED = (
    "published, 30B, not measured here:\n98.7 % of ar's mean of 11 tasks at 2.42x its tokens/s"
)
# What stands before a value where it labels a point.
_PREFIXES = {
    "confidence_threshold": "",
    "steps_per_block": "T=",
    "draft_steps": "n=",
    "mix_ratio": "R=",
    "quality": "",
}
_LOSSLESS = {"ar": "s", "verified": "D", "lookup": "^", "denoiser": "v"}
_LINES = ("-", "--", ":", "-.")
_TICKS = (0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16)
_COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
)


def plot(points: Sequence[Line], path: Path, title: str) -> None:
    """Writes an SVG of two panels: likelihood relative to ar, and agreement with greedy ar.

    The published point stands where its speed-up would be if every pass cost what an ar step
    costs, and at its share of ar's task scores, which is no likelihood: it is a landmark.
    """
    matplotlib = import_module("matplotlib")
    # A backend that needs no display.
    matplotlib.use("agg")
    pyplot = import_module("matplotlib.pyplot")
    # The same file for the same figures.
    with matplotlib.rc_context({"svg.hashsalt": "twotower", "svg.fonttype": "path"}):
        figure, panels = pyplot.subplots(1, 2, figsize=(13, 6.4), layout="constrained")
        for axes, column in zip(panels, ("relative_quality", "agreement"), strict=True):
            _panel(axes, points, column)
        panels[0].plot(
            PUBLISHED_SPEEDUP,
            PUBLISHED_QUALITY,
            linestyle="none",
            marker="*",
            markersize=17,
            markerfacecolor="none",
            markeredgecolor="black",
            label=_PUBLISHED,
        )
        panels[0].set(
            title="probability of a token under the context tower, relative to ar",
            ylabel="exp(mean log-probability - ar's)",
        )
        panels[1].set(title="tokens equal to greedy ar's", ylabel="share of positions")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize="small", loc="outside lower center", ncols=4)
        figure.suptitle(title)
        figure.savefig(path, format="svg", metadata={"Date": None})
        pyplot.close(figure)


def _panel(axes: Any, points: Sequence[Line], column: str) -> None:
    curves = _curves(points)
    blocks = sorted({block for _, block in curves if block is not None})
    strategies = list(dict.fromkeys(name for name, _ in curves))
    for (strategy, block), line in curves.items():
        rank = 0 if block is None else blocks.index(block)
        # Of a single block size, strategies tell themselves apart by colour too.
        hue = rank if len(blocks) > 1 else strategies.index(strategy)
        style = {
            "color": "black" if block is None else _COLOURS[hue % len(_COLOURS)],
            "linestyle": _LINES[strategies.index(strategy) % len(_LINES)],
            "label": strategy if block is None else f"{strategy}, blocks of {block}",
        }
        _curve(axes, line, column, style, rank)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()
    reach = [point["tokens_per_pass"] for point in points]
    axes.set_xlim(0.92 * min(reach), 1.15 * max(*reach, PUBLISHED_SPEEDUP))
    axes.set_ylim(0, 1.15)
    axes.set_xlabel("tokens per pass, both towers' passes counted")
    axes.grid(alpha=0.3)


def _curve(axes: Any, line: Sequence[Line], column: str, style: dict[str, str], rank: int) -> None:
    """Points of a strategy and block size with their intervals and labels; lossless ones have a
    marker of their own and no line."""
    strategy = line[0]["strategy"]
    marker = _LOSSLESS.get(strategy)
    x = [point["tokens_per_pass"] for point in line]
    y = [point[column] for point in line]
    shape: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 1.2, "elinewidth": 0.6}
    if marker:
        shape |= {"marker": marker, "markersize": 6, "linestyle": "none"}
    axes.errorbar(x, y, yerr=_errors(line, column), **{**style, **shape})
    # Lossless points of several block sizes stand beside each other on one height.
    offset = (3, 3 + 8 * rank if marker else 3)
    for place, (point, where) in enumerate(zip(line, zip(x, y, strict=True), strict=True)):
        if strategy == "auto":
            # Its points lie close together, below the lossless ones.
            offset = (3, -10 - 9 * place)
        axes.annotate(
            _label(point),
            where,
            offset,
            textcoords="offset points",
            fontsize=7,
            color=style["color"],
        )


def _curves(points: Sequence[Line]) -> dict[tuple[str, int | None], list[Line]]:
    """Points by strategy and block size, in order of their tokens per pass."""
    found: dict[tuple[str, int | None], list[Line]] = {}
    for point in points:
        found.setdefault((point["strategy"], point["block_size"]), []).append(point)
    return {
        curve: sorted(line, key=lambda point: float(point["tokens_per_pass"]))
        for curve, line in found.items()
    }


def _errors(line: Sequence[Line], column: str) -> list[list[float]]:
    """Lengths of the intervals below and above each point."""
    if column == "agreement":
        low = [point["agreement_low"] for point in line]
        high = [point["agreement_high"] for point in line]
    else:
        # A quality is exp(-loss): what multiplies it is the interval of the loss.
        low, high = _relative(line, "loss_high"), _relative(line, "loss_low")
    values = [point[column] for point in line]
    below = [max(0.0, value - least) for value, least in zip(values, low, strict=True)]
    return [below, [max(0.0, most - value) for value, most in zip(values, high, strict=True)]]


def _relative(line: Sequence[Line], name: str) -> list[float]:
    return [exp(-point[name]) for point in line]


def _label(point: Line) -> str:
    """What tells a point from the others of its line."""
    axes = [axis for axis in STRATEGIES[point["strategy"]].axes if axis != "block_size"]
    if point["strategy"] in ("lookup", "ar"):
        return str(point["strategy"])
    values = [f"{_PREFIXES.get(axis, f'{axis}=')}{shown_value(point[axis])}" for axis in axes]
    return " ".join(values) or str(point["name"])
