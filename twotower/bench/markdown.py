"""Formats a report as Markdown tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

Entry = dict[str, Any]


def markdown(report: Entry) -> str:
    """The report's sections that have entries, and the steps that failed or were left out."""
    parts = [
        _head(report),
        _section("Decoding", _DECODE, _once(map(_decode_row, report["decode"]), 4)),
        _section("Passes of the engines", _PASSES, _once(_pass_rows(report["decode"]), 4)),
        _section(
            "mask_diffusion over AR", _RATIOS, [_ratio_row(entry) for entry in report["ratios"]]
        ),
        _section("Against plain PyTorch", _BASELINE, map(_baseline_row, report["baseline"])),
        *(_operators(entry) for entry in report["operators"]),
        *(_attention(entry) for entry in report["attention"]),
        *(_scans(entry) for entry in report["scans"]),
        _invariance(report),
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
_INVARIANCE = ("mode", "rows", "rows compared", "tokens differ", "bits differ")
_OPERATORS = ("operator", "calls", "us", "floor us", "share of floor")


def _head(report: Entry) -> str:
    hardware, ceilings, options = report["hardware"], report["ceilings"], report["options"]
    device = hardware["device"] if hardware["device"] == "CPU" else f"one {hardware['device']}"
    unique = options["unique"]
    routing = f"narrowed to {unique:g} experts for one row" if unique else "as the weights have it"
    experts = options["experts"]
    if options.get("expert_products", "widened") != "widened":
        experts += f" and products in {options['expert_products']}"
    narrow = ceilings.get("fp8_flops")
    in_8_bits = f", 8-bit products {narrow / 1e12:.3g} TFLOP/s" if narrow else ""
    return (
        f"Measured on {report['date']} on {device} (host {hardware['cpu']}), torch "
        f"{hardware['torch']}, Triton {hardware['triton']}: random weights at preset "
        f"{options['preset']}, "
        f"{options['dtype']}, experts {experts}, "
        f"{'deterministic, ' if options.get('deterministic') else ''}"
        f"the denoiser's routing {routing}. "
        f"Ceilings of the same run: copy {ceilings['bytes_per_s'] / 1e12:.3g} TB/s, products "
        f"{ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s, fp32 products "
        f"{ceilings['wide_flops'] / 1e12:.3g} TFLOP/s{in_8_bits}."
    )


def _section(title: str, names: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [_line(row) for row in rows]
    if not lines:
        return ""
    return "\n".join([f"### {title}", "", _line(names), "|" + "---|" * len(names), *lines])


def _once(rows: Iterable[list[object]], names: int) -> list[list[object]]:
    """The rows, less those whose first `names` cells came before: AR runs beside every profile."""
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


def _profile(entry: Entry) -> str | None:
    return f"{entry['profile']}, {entry['sync']}" if entry["profile"] else None


def _decode_row(entry: Entry) -> list[object]:
    passes = entry["passes"]
    return [
        entry["mode"],
        _profile(entry),
        entry["rows"],
        entry["context"],
        entry["tokens_per_s"],
        entry["spread"],
        entry["nfe_a_block"],
        passes[0]["rows_a_pass"] if passes else None,
    ]


def _pass_rows(decode: Sequence[Entry]) -> list[list[object]]:
    return [
        [
            passes["kind"],
            entry["mode"],
            entry["rows"],
            entry["context"],
            *(passes[name] for name in ("ms", "unique_experts", "gigabytes", "floor_ms")),
            *(passes[name] for name in ("share_of_floor", "terabytes_per_s", "share_of_copy")),
        ]
        for entry in decode
        for passes in entry["passes"]
        if "floor_ms" in passes
    ]


def _ratio_row(entry: Entry) -> list[object]:
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
    return [_profile(entry), *(entry[name] for name in names)]


def _baseline_row(entry: Entry) -> list[object]:
    names = ("eager_ms", "compiled_ms", "compiled_graph_ms", "ours_ms", "speedup")
    known = [entry["kind"], entry["rows"], entry["context"], entry["unique_experts"]]
    return [*known, *(entry.get(name) for name in names)]


def _operators(entry: Entry) -> str:
    title = (
        f"Operators: {entry['kind']}, {entry['rows']} rows, context {entry['context']}, "
        f"{entry['unique_experts']:.3g} unique experts"
    )
    names = ("name", "calls", "us", "floor_us", "share_of_floor")
    rows = [[line[name] for name in names] for line in entry["operators"]]
    return _section(title, _OPERATORS, rows)


def _attention(entry: Entry) -> str:
    title = f"Block attention, {entry['rows']} rows"
    rows = [(line["context"], line["attention_ms"]) for line in entry["contexts"]]
    table = _section(title, ("context", "attention ms a pass"), rows)
    return (
        f"{table}\n\nAt {entry['context']} tokens attention is "
        f"{100 * entry['share_of_pass']:.1f} % of "
        f"a pass of {entry['pass_ms']:.3g} ms ({entry['share_of_floor']:.2f} of its floor, "
        f"{entry['unique_experts']:.3g} unique experts); {entry['growth_of_context']:g} times the "
        f"context takes {entry['growth']:.2f} times as long."
    )


def _scans(entry: Entry) -> str:
    return (
        f"{entry['scans']} seeded block scans with states up to {entry['largest_state']:g}: "
        f"{entry['bad_rows']} rows with anything that is not finite."
    )


def _invariance(report: Entry) -> str:
    """Shares of rows that a batch changes; reports of earlier versions have none."""
    entries = report.get("invariance", [])
    names = ("mode", "rows", "compared", "tokens_differ", "bits_differ")
    rows = [[entry[name] for name in names] for entry in entries]
    table = _section("Rows in a batch against themselves alone", _INVARIANCE, rows)
    if not table:
        return ""
    first = entries[0]
    return (
        f"{table}\n\nShares of rows that read {first['prompt']} tokens and write "
        f"{first['tokens']}; bits are those of every token's log-probability. Random towers are "
        "seldom sure of a token, so that a bit decides one more often than in a trained model."
    )


def _missing(steps: Sequence[Entry]) -> str:
    lines = [
        f"- {step['step']}: {step['status']}, {step['reason']}"
        for step in steps
        if step["status"] != "done"
    ]
    return "\n".join(["Not measured:", "", *lines]) if lines else ""
