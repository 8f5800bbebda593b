"""Ways of decoding, timed side by side in this process.

Runs alternate, and the order turns by one place every round, so that what else the machine does
meets all ways alike. Seconds are those of the wall, or with `cpu` those that this process has
computed and been delayed: on a machine that others use, what the wall would show without them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.figures import median
from benchmarks.in_process import Local
from twotower import GenerationResult, Request
from twotower.towers.engine.engine import Engine
from twotower.towers.request.params import GenerationParams

Clock = Callable[[], float]
Ways = Mapping[str, GenerationParams]
CLOCKS = ("wall", "cpu")


@dataclass
class Delay:
    """Makes every pass of an engine last longer: by `share` of what it computes, and by `seconds`.

    `total` are the seconds that it has added.
    """

    share: float = 0.0
    seconds: float = 0.0
    total: float = field(default=0.0, init=False)

    def put_into(self, engine: Engine[Any, Any, Any]) -> None:
        """Delays the engine's passes from now on, inside of what it takes for their time."""
        loop = engine._loop
        run = loop._run

        def delayed(works: Sequence[Any]) -> Sequence[Any]:
            # Of computing alone: a pass during which others compute is not delayed for longer.
            began = time.thread_time()
            results = run(works)
            more = self.share * (time.thread_time() - began) + self.seconds
            time.sleep(more)
            self.total += more
            return results

        loop._run = delayed


def clock_of(kind: str, delays: Sequence[Delay] = ()) -> Clock:
    """The clock of that name."""
    if kind == "wall":
        return time.perf_counter
    return lambda: time.process_time() + sum(delay.total for delay in delays)


def decode(
    local: Local, prompts: Sequence[list[int]], params: GenerationParams
) -> list[GenerationResult]:
    """The result of each prompt; prompt i has seed i."""
    requests = [Request(prompt, replace(params, seed=i)) for i, prompt in enumerate(prompts)]
    return local.model.generate_requests(requests)


def speeds(
    local: Local, prompts: Sequence[list[int]], ways: Ways, rounds: int, clock: Clock
) -> dict[str, list[float]]:
    """Tokens/s of every way in every round."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            began = clock()
            results = decode(local, prompts, ways[name])
            seconds = clock() - began
            found[name].append(sum(len(result.token_ids) for result in results) / seconds)
    return found


def ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """The median of the rounds' ratios, and the least and the largest of them."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return {"median": median(ratios), "low": round(min(ratios), 3), "high": round(max(ratios), 3)}


def spread(found: Mapping[str, float]) -> str:
    """A ratio as it is read: median, and least to largest."""
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"
