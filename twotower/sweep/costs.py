"""What passes cost: measured here, or read from a file.

A point's speed-up over `ar` at given pass costs is the cost of ar's passes a token over the cost of
its own: passes of each kind, counted, times the milliseconds of one with all rows in it. Reading
prompts is left out on both sides.

A pass of the context tower over the last token and d drafted ones costs

    ar + d / (B - 1) * (verify - ar)

where `verify` is that over a whole block of B: a step (d = 0) costs what an `ar` step does, and the
check of a lookup what its length says. This is linear in d, so that the sums of passes and of
drafted tokens are enough, whoever drafted.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from twotower.bench.decode import SPARE, Decoded, EnginePair, Run
from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.towers.errors import InvalidRequestError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.modes import TRAITS

_ROUNDS = 9
_BLOCKS, _WARM = 3, 1
_AR_BLOCK = 8
# A block's tokens in this many passes, when a pass is timed.
_PASSES = 4
_MS = ("denoise", "extend", "verify")


@dataclass(frozen=True)
class PassCosts:
    """Milliseconds of a pass over `rows` rows: of an `ar` step, and by block size those of a
    denoiser pass, of an extension and of the check of a draft. `source` says where from."""

    source: str
    rows: float
    ar: float
    blocks: Mapping[int, Mapping[str, float]]

    def to_dict(self) -> dict[str, Any]:
        """As JSON; `read_costs` reads it."""
        blocks = {str(size): dict(ms) for size, ms in sorted(self.blocks.items())}
        return {"source": self.source, "rows": self.rows, "ar_ms": self.ar, "block_ms": blocks}

    def speedup(self, point: Mapping[str, Any], ar: Mapping[str, Any]) -> float | None:
        """Speed-up over `ar` of a point, both as lines of a report; None without the costs of its
        block size."""
        traits = TRAITS[point["mode"]]
        if traits.denoiser == "never":
            return 1.0
        ms = self.blocks.get(point["block_size"], {})
        kind = "extend" if traits.tokens_from == "denoiser" else "verify"
        needed = {kind, "denoise"} if point["nfe"] else {kind}
        if traits.unit == "token" or not needed <= set(ms):
            return None
        context = point["context_passes"]
        if kind == "extend":
            own = context * ms[kind]
        else:
            token = (ms[kind] - self.ar) / max(1, point["block_size"] - 1)
            own = context * self.ar + point["drafted_tokens"] * token
        own += point["nfe"] * ms.get("denoise", 0.0)
        ars = ar["context_passes"] * self.ar
        return (ars / ar["tokens"]) / (own / point["tokens"]) if own else None


def read_costs(path: Path, rows: int) -> PassCosts:
    """The costs in a report of `twotower bench`, at its number of rows that is nearest to `rows`,
    or in the `costs.json` of a sweep. Raises InvalidRequestError for any other file."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
        if "decode" in body:
            return _of_report(body, path.name, rows)
        blocks = {int(size): dict(ms) for size, ms in body["block_ms"].items()}
        return PassCosts(str(body["source"]), body["rows"], float(body["ar_ms"]), blocks)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        limit = f"a report of `twotower bench` or costs of a sweep ({error!r})"
        raise InvalidRequestError("pass_costs", path.name, limit) from None


def _of_report(body: Mapping[str, Any], name: str, rows: int) -> PassCosts:
    counts = {entry["rows"] for entry in body["decode"]}
    nearest = min(counts, key=lambda count: (abs(count - rows), count))
    times: dict[str, list[float]] = {}
    for entry in body["decode"]:
        for each in entry["passes"]:
            # Rows out of step share passes of fewer rows, which say nothing of a full one.
            if entry["rows"] == nearest and round(each["rows_a_pass"], 3) == nearest:
                times.setdefault(each["kind"], []).append(each["ms"])
    ms = {kind: statistics.median(values) for kind, values in times.items()}
    source = f"{name}: {body['hardware']['device']}, {body.get('date', 'undated')}"
    block = {kind: ms[kind] for kind in _MS if kind in ms}
    return PassCosts(source, nearest, ms["ar"], {body["options"]["block"]: block})


@dataclass(frozen=True)
class Bench:
    """Passes to be timed: of these towers, over `rows` rows of `context` tokens."""

    context_tower: ContextTower
    denoiser_tower: DenoiserTower
    rows: int
    context: int


def measure(
    bench: Bench, block_sizes: Sequence[int], source: str, tick: Callable[[str], None]
) -> PassCosts:
    """Times passes by the engines themselves, medians of rounds in which all kinds take turns.
    `tick` is told what is timed."""
    blocks = sorted(set(block_sizes))
    # A draft may begin at the last token that a row may write.
    room = (SPARE * (_WARM + _BLOCKS) + 1) * max(*blocks, _AR_BLOCK)
    pages = pages_of_rows(bench.rows, bench.context + room)
    tower = bench.context_tower
    pool = FilledPool(tower.config, bench.rows, pages, tower.device, tower.dtype)
    most = bench.rows * max(blocks)
    with EnginePair(bench.context_tower, bench.denoiser_tower, pool, most) as pair:
        return _measured(pair, bench, blocks, source, tick)


def _measured(
    pair: EnginePair,
    bench: Bench,
    blocks: Sequence[int],
    source: str,
    tick: Callable[[str], None],
) -> PassCosts:
    runs: dict[Run, list[Decoded]] = {run: [] for run in _runs(bench, blocks)}
    for run in runs:
        # Not counted: at its first use a pass sets things up.
        pair.warm_up(run.block_size, bench.rows)
        pair.decode(replace(run, blocks=1))
    for round_ in range(_ROUNDS):
        for run, done in runs.items():
            tick(f"pass costs, round {round_ + 1} of {_ROUNDS}")
            done.append(pair.decode(run))
    ar = 0.0
    ms: dict[int, dict[str, float]] = {size: {} for size in blocks}
    for run, done in runs.items():
        context = _median(done, lambda decoded: decoded.context.seconds_a_pass)
        denoise = _median(done, lambda decoded: decoded.denoiser.seconds_a_pass)
        if run.mode == "ar":
            ar = context
        elif run.mode == "verified":
            ms[run.block_size]["verify"] = context
        else:
            ms[run.block_size] |= {"denoise": denoise, "extend": context}
    return PassCosts(source, bench.rows, ar, ms)


def _runs(bench: Bench, blocks: Sequence[int]) -> Iterator[Run]:
    shape = bench.rows, bench.context, _BLOCKS, _WARM
    yield Run("ar", *shape, _AR_BLOCK)
    for size in blocks:
        schedule = _even(size)
        yield Run("mask_diffusion", *shape, size, ((schedule,),) * bench.rows)
        yield Run("verified", *shape, size)


def _even(size: int) -> tuple[int, ...]:
    """A block's tokens over at most _PASSES passes, as evenly as it goes."""
    passes = min(size, _PASSES)
    return tuple(size // passes + (index < size % passes) for index in range(passes))


def _median(done: Sequence[Decoded], seconds: Callable[[Decoded], float]) -> float:
    return 1e3 * statistics.median(seconds(decoded) for decoded in done)
