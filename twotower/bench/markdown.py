"""A report as markdown, to be pasted into a page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Entry = dict[str, Any]


def markdown(report: Entry) -> str:
    """All sections that hold something, and what is missing."""
    parts = [
        _head(report),
        _section("Decoding", _DECODE, _once(map(_decode_row, report["decode"]), 4)),
        _section("Passes of the engines", _PASSES, _once(_pass_rows(report["decode"]), 4)),
        _section("mask_diffusion over AR", _RATIOS, [_ratio_row(own) for own in report["ratios"]]),
        _section("Against plain PyTorch", _BASELINE, map(_baseline_row, report["baseline"])),
        *(_operators(own) for own in report["operators"]),
        *(_attention(own) for own in report["attention"]),
        *(_scans(own) for own in report["scans"]),
        _missing(report["steps"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


_DECODE = (
    "mode",
    "profile",
    "rows",
    "context",
    "tokens/s",
    "spread",
    "NFE a block",
    "rows a pass",
)
_PASSES = (
    "pass",
    "mode",
    "rows",
    "context",
    "ms",
    "unique experts",
    "GB",
    "floor ms",
    "share of floor",
    "TB/s",
    "share of copy",
)
_RATIOS = (
    "profile",
    "rows",
    "context",
    "NFE a block",
    "ratio",
    "ceiling",
    "share of ceiling",
    "diffusion / its floor",
    "AR / its floor",
)
_BASELINE = (
    "pass",
    "rows",
    "context",
    "unique experts",
    "eager ms",
    "compiled ms",
    "compiled, CUDA graph ms",
    "engine ms",
    "better of eager and compiled / engine",
)
_OPERATORS = ("operator", "calls", "us", "floor us", "share of floor")


def _head(report: Entry) -> str:
    own, ceilings, options = report["hardware"], report["ceilings"], report["options"]
    device = own["device"] if own["device"] == "CPU" else f"one {own['device']}"
    unique = options["unique"]
    routing = f"narrowed to {unique:g} experts for one row" if unique else "as the weights have it"
    return (
        f"Measured on {report['date']} on {device} (host {own['cpu']}), torch {own['torch']}, "
        f"Triton {own['triton']}: random weights at preset {options['preset']}, "
        f"{options['dtype']}, experts {options['experts']}, the denoiser's routing {routing}. "
        f"Ceilings of the same run: copy {ceilings['bytes_per_s'] / 1e12:.3g} TB/s, products "
        f"{ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s, fp32 products "
        f"{ceilings['wide_flops'] / 1e12:.3g} TFLOP/s."
    )


def _section(title: str, names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [_line(row) for row in rows]
    if not lines:
        return ""
    return "\n".join([f"### {title}", "", _line(names), "|" + "---|" * len(names), *lines])


def _once(rows: Iterable[list[object]], names: int) -> list[list[object]]:
    """The first of all rows that agree in their first `names` cells: AR runs beside everything."""
    first: dict[tuple[object, ...], list[object]] = {}
    for row in rows:
        first.setdefault(tuple(row[:names]), row)
    return list(first.values())


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(_cell(cell) for cell in cells) + " |"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _profile(own: Entry) -> str | None:
    return f"{own['profile']}, {own['sync']}" if own["profile"] else None


def _decode_row(own: Entry) -> list[object]:
    passes = own["passes"]
    return [
        own["mode"],
        _profile(own),
        own["rows"],
        own["context"],
        own["tokens_per_s"],
        own["spread"],
        own["nfe_a_block"],
        passes[0]["rows_a_pass"] if passes else None,
    ]


def _pass_rows(decode: Sequence[Entry]) -> list[list[object]]:
    return [
        [
            own["kind"],
            entry["mode"],
            entry["rows"],
            entry["context"],
            *(own[name] for name in ("ms", "unique_experts", "gigabytes", "floor_ms")),
            *(own[name] for name in ("share_of_floor", "terabytes_per_s", "share_of_copy")),
        ]
        for entry in decode
        for own in entry["passes"]
        if "floor_ms" in own
    ]


def _ratio_row(own: Entry) -> list[object]:
    names = (
        "rows",
        "context",
        "nfe_a_block",
        "ratio",
        "ceiling",
        "share_of_ceiling",
        "diffusion_share_of_floor",
        "ar_share_of_floor",
    )
    return [_profile(own), *(own[name] for name in names)]


def _baseline_row(own: Entry) -> list[object]:
    names = ("eager_ms", "compiled_ms", "compiled_graph_ms", "ours_ms", "speedup")
    known = [own["kind"], own["rows"], own["context"], own["unique_experts"]]
    return [*known, *(own.get(name) for name in names)]


def _operators(own: Entry) -> str:
    title = (
        f"Operators: {own['kind']}, {own['rows']} rows, context {own['context']}, "
        f"{own['unique_experts']:.3g} unique experts"
    )
    names = ("name", "calls", "us", "floor_us", "share_of_floor")
    rows = [[line[name] for name in names] for line in own["operators"]]
    return _section(title, _OPERATORS, rows)


def _attention(own: Entry) -> str:
    title = f"Block attention, {own['rows']} rows"
    rows = [(line["context"], line["attention_ms"]) for line in own["contexts"]]
    table = _section(title, ("context", "attention ms a pass"), rows)
    return (
        f"{table}\n\nAt {own['context']} tokens attention is {100 * own['share_of_pass']:.1f} % of "
        f"a pass of {own['pass_ms']:.3g} ms ({own['share_of_floor']:.2f} of its floor, "
        f"{own['unique_experts']:.3g} unique experts); {own['growth_of_context']:g} times the "
        f"context takes {own['growth']:.2f} times as long."
    )


def _scans(own: Entry) -> str:
    return (
        f"{own['scans']} seeded block scans with states up to {own['largest_state']:g}: "
        f"{own['bad_rows']} rows with anything that is not finite."
    )


def _missing(steps: Sequence[Entry]) -> str:
    lines = [
        f"- {step['step']}: {step['status']}, {step['reason']}"
        for step in steps
        if step["status"] != "done"
    ]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
