"""What `twotower top` shows of two readings of a service."""

from __future__ import annotations

from datetime import timedelta

from rich.console import Group
from rich.table import Table
from rich.text import Text

from twotower.cli.readings import PairReading, Rates, Reading, TowerReading, ratio
from twotower.towers.errors import cut_off

_NONE = "-"
# A share from which a tower is what the service waits for.
_BUSY = 0.9
_MIB = 1 << 20


def page(target: str, before: Reading, now: Reading, missing: str = "") -> Group:
    """The whole page; `missing` says why there is no newer reading."""
    rates = Rates(before, now)
    parts: list[Text | Table] = [
        _line(f"{now.model} {now.version} on {target}, up {_duration(now.uptime_s)}"),
        _line(_rows(now, rates)),
        _line(_tokens(rates)),
        Text(),
        _towers(now, rates),
    ]
    if missing:
        parts.append(_line(missing, "bold red"))
    return Group(*parts)


def _line(text: str, style: str = "") -> Text:
    # Names come from the service.
    shown = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)
    return Text(shown, style, no_wrap=True, overflow="ellipsis")


def _rows(now: Reading, rates: Rates) -> str:
    router = now.router
    return (
        f"rows: {router.running:,} running, {router.waiting:,} waiting; "
        f"requests: {router.requests_total:,}, {_figure(rates.per_second('requests_total'))}/s"
    )


def _tokens(rates: Rates) -> str:
    return (
        f"tokens/s: {_figure(rates.per_second('generation_tokens_total'))} written, "
        f"{_figure(rates.per_second('prompt_tokens_total'))} read; "
        f"tokens/NFE: {_figure(rates.tokens_per_nfe(), 2)}; "
        f"passes/s: {_figure(rates.per_second('nfe_total'))} denoiser, "
        f"{_figure(rates.per_second('context_passes_total'))} context"
    )


def _towers(now: Reading, rates: Rates) -> Table:
    """A line for each tower of each pair."""
    table = Table(box=None, pad_edge=False)
    for name in ("pair", "tower"):
        table.add_column(name, no_wrap=True)
    names = ("busy", "passes/s", "rows", "queued", "slots", "pages", "MiB", "prefix hits", "eased")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for pair in now.pairs:
        for tower, values in pair.towers.items():
            busy = rates.busy_share(pair.pair, tower, values)
            passes = rates.tower_per_second(pair.pair, tower, values, "passes")
            table.add_row(
                _line(cut_off(pair.pair, 24)),
                _line(tower),
                Text(_share(busy), style="bold" if busy is not None and busy >= _BUSY else ""),
                _figure(passes),
                *_load(values),
                _easing(pair, tower),
            )
    return table


def _load(values: TowerReading) -> tuple[str, ...]:
    state = ratio(values.get("state_bytes"), _MIB)
    hits, misses = values.get("cache_hits"), values.get("cache_misses")
    asked = None if hits is None or misses is None else hits + misses
    return (
        _count(values.get("rows")),
        _count(values.get("queued_rows")),
        _used(values, "slots"),
        _used(values, "pages"),
        _figure(state),
        _share(ratio(hits, asked)),
    )


def _easing(pair: PairReading, tower: str) -> str:
    """Of the denoiser alone: steps and thresholds are its."""
    return _share(pair.eased) if tower == "denoiser" else _NONE


def _used(values: TowerReading, name: str) -> str:
    used, all_of_them = values.get(f"{name}_used"), values.get(name)
    if used is None or all_of_them is None:
        return _NONE
    return f"{used:,.0f}/{all_of_them:,.0f}"


def _count(value: float | None) -> str:
    return _NONE if value is None else f"{value:,.0f}"


def _figure(value: float | None, digits: int = 1) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"


def _share(value: float | None) -> str:
    return _NONE if value is None else f"{value:.0%}"


def _duration(seconds: float) -> str:
    try:
        return str(timedelta(seconds=int(max(0.0, seconds))))
    except OverflowError:
        return f"{seconds:g} s"
