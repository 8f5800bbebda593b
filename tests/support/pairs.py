"""The pairs of a running service, as Serve and they themselves see them."""

from __future__ import annotations

import time
from collections import Counter

from ray import serve

from twotower.deployments.app import PAIR_DEPLOYMENT
from twotower.deployments.config import APP_NAME

# Rows go with their streams, slots with the pass that may still touch them.
GONE_S = 10.0


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
