"""Plots a report; needs matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
NO_MATPLOTLIB = "plot: needs matplotlib; pip install 'twotower[bench]'"


def can_plot() -> bool:
    """True if matplotlib is installed."""
    try:
        import_module("matplotlib")
    except ImportError:
        return False
    return True


def plot(report: Entry, path: Path) -> None:
    """Writes a PNG: tokens/s, their ratio to AR and shares of the floors, by number of rows."""
    matplotlib = import_module("matplotlib")
    # A backend that needs no display.
    matplotlib.use("agg")
    pyplot = import_module("matplotlib.pyplot")
    figure, (speed, ratio, share) = pyplot.subplots(1, 3, figsize=(15, 4.5), layout="constrained")
    for label, points in _speeds(report["decode"]).items():
        speed.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
    for label, pairs in _ratios(report["ratios"]).items():
        rows = sorted(pairs)
        (line,) = ratio.plot(rows, [pairs[count][0] for count in rows], marker="o", label=label)
        ceilings = [pairs[count][1] for count in rows]
        ratio.plot(rows, ceilings, linestyle=":", color=line.get_color())
    for label, points in _shares(report["decode"]).items():
        share.plot(*zip(*sorted(points.items()), strict=True), marker="o", label=label)
    titles = ("tokens/s", "mask_diffusion over AR (dotted: ceiling)", "share of a pass's floor")
    for axes, title in zip((speed, ratio, share), titles, strict=True):
        axes.set(title=title, xlabel="rows", ylim=(0, None))
        axes.grid(alpha=0.3)
        if axes.get_lines():
            axes.legend(fontsize="small")
    options = report["options"]
    figure.suptitle(
        f"{report['hardware']['device']}, {options['preset']}, {options['dtype']}, "
        f"context {options['context']}, {report['date']}"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
    pyplot.close(figure)


def _label(entry: Entry) -> str:
    profile = entry.get("profile")
    return f"{profile}, {entry['sync']}" if profile else str(entry["mode"])


def _speeds(decode: list[Entry]) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for entry in decode:
        if entry["mode"] != "verified":
            lines.setdefault(_label(entry), {})[entry["rows"]] = entry["tokens_per_s"]
    return lines


def _ratios(ratios: list[Entry]) -> dict[str, dict[int, tuple[float, float]]]:
    lines: dict[str, dict[int, tuple[float, float]]] = {}
    for entry in ratios:
        lines.setdefault(_label(entry), {})[entry["rows"]] = (entry["ratio"], entry["ceiling"])
    return lines


def _shares(decode: list[Entry]) -> dict[str, dict[int, float]]:
    lines: dict[str, dict[int, float]] = {}
    for entry in decode:
        for each in entry["passes"]:
            if "share_of_floor" in each:
                lines.setdefault(each["kind"], {}).setdefault(entry["rows"], each["share_of_floor"])
    return lines
