"""The pairs of a running service, as Serve and they themselves see them."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from ray import serve

from twotower.deployments.app import PAIR_DEPLOYMENT
from twotower.deployments.config import APP_NAME

# Rows go with their streams, slots with the pass that may still touch them.
GONE_S = 10.0
# Questions, one of which each pair answers all but certainly.
ASKED_PER_PAIR = 16


def pair_states() -> Counter[str]:
    """How many pairs are in each of Serve's states."""
    deployments = serve.status().applications[APP_NAME].deployments
    states = deployments[PAIR_DEPLOYMENT].replica_states
    return Counter({str(getattr(name, "value", name)): count for name, count in states.items()})


def pair_stats(times: int) -> list[dict[str, dict[str, float]]]:
    """Counters by tower, of whichever pairs Serve lets answer so many questions."""
    asking = serve.get_deployment_handle(PAIR_DEPLOYMENT, APP_NAME).stats
    try:
        # One after the other: of many at once Serve gives all to the first two that it has drawn.
        return [asking.remote().result(timeout_s=60) for _ in range(times)]
    finally:
        # It reports to the controller, from a thread that would outlive this service.
        asking.shutdown()


def prompt_tokens_read(pairs: int) -> list[float]:
    """Prompt tokens that each pair has read, the pair that began first in front. To be asked when
    nothing runs: Serve chooses who answers, and a pair is known by what it has done, if anything.
    """
    found: dict[float, tuple[float, float]] = {}
    for stats in pair_stats(ASKED_PER_PAIR * pairs):
        tower = stats["context"]
        age = tower["pass_seconds"] / tower["busy_share"] if tower["passes"] else 0.0
        found[tower["pass_seconds"]] = age, tower["prefill_tokens"]
    read = [tokens for _, tokens in sorted(found.values(), reverse=True) if tokens]
    return read + [0.0] * (pairs - len(read))


def held(pairs: int) -> float:
    """Rows, slots and mirrors of the pairs that answer, asked often enough to reach them all."""
    towers = [tower for stats in pair_stats(4 * pairs) for tower in stats.values()]
    names = ("rows", "slots_used", "mirrors")
    return sum(tower.get(name, 0.0) for tower in towers for name in names)


def await_whole(pairs: int, timeout_s: float) -> float:
    """Waits until all pairs are up and answer; returns what they hold. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if pair_states() == Counter(RUNNING=pairs):
                return held(pairs)
        except Exception as error:  # a pair or a controller that has just gone
            print(f"not whole yet: {type(error).__name__}")
        time.sleep(0.2)
    raise TimeoutError(f"not whole after {timeout_s:g} s: {serve.status()}")


def left_over(pairs: int, timeout_s: float) -> float:
    """What the pairs still hold once all are up, after a time in which all of it should be gone.

    Raises TimeoutError if they do not come up.
    """
    left = await_whole(pairs, timeout_s)
    deadline = time.monotonic() + GONE_S
    while left and time.monotonic() < deadline:
        time.sleep(0.1)
        left = await_whole(pairs, timeout_s)
    return left


def rows_held() -> tuple[float, float, float]:
    """Rows in a pair's context actor and its denoiser actor, and rows that the link follows."""
    (stats,) = pair_stats(1)
    return stats["context"]["rows"], stats["denoiser"]["rows"], stats["denoiser"]["mirrors"]


def memory_held() -> float:
    """Slots of both towers, and pages of the denoiser: the context tower's may be cached."""
    (stats,) = pair_stats(1)
    return sum(
        stats[tower][name]
        for tower, name in (
            ("context", "slots_used"),
            ("denoiser", "slots_used"),
            ("denoiser", "pages_used"),
        )
    )


def await_no_rows() -> None:
    """Waits until the only pair holds no row and no memory of one."""
    # Well below the time that the longest rows of tests take to their end, on a slow machine too.
    await_true(lambda: rows_held() == (0, 0, 0), "rows are left", timeout_s=8)
    # Slots and pages follow with the end of the pass that may have touched them.
    await_true(lambda: memory_held() == 0, "memory is left", timeout_s=8)


def await_true(condition: Callable[[], bool], what: str, timeout_s: float = 90.0) -> float:
    """Seconds until a condition holds. AssertionError with `what` after `timeout_s`."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout_s, what
        time.sleep(0.05)
    return time.monotonic() - begin
