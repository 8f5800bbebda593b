"""Pairs that wait for resources: said every few seconds, for as long as they wait.

A pair is a placement group. Ray tells which groups it has no place for, and Serve's names of them
tell whose they are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import placement_group_table

from twotower.cluster.placement.room import in_words
from twotower.deployments.config import APP_NAME
from twotower.deployments.router.router import Router

logger = logging.getLogger("ray.serve")

SAY_EVERY_S = 5.0
_WAITS = ("PENDING", "RESCHEDULING")


class WaitingPairs:
    """A thread that says, by `say`, which pairs wait and what for. Use as a context manager, or
    `start` it for the life of the process."""

    def __init__(self, say: Callable[[str], None], every_s: float = SAY_EVERY_S) -> None:
        self._say = say
        self._every = every_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="waiting-pairs", daemon=True)

    def start(self) -> None:
        """Begins to look; the first line comes if a pair waits after `every_s`."""
        self._thread.start()

    def __enter__(self) -> WaitingPairs:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join(self._every)

    def _watch(self) -> None:
        before: set[str] = set()
        while not self._stopped.wait(self._every):
            try:
                waiting = waiting_groups(placement_group_table()) if ray.is_initialized() else {}
                line = waiting_line(
                    [bundles for name, bundles in waiting.items() if name in before],
                    ray.available_resources() if waiting else {},
                )
            except (RayError, RuntimeError, ConnectionError) as error:
                # Ray is going, or comes back: the next look tells.
                logger.debug("waiting pairs: %s", type(error).__name__)
                continue
            # A group that has just been made waits for a moment in any case.
            before = set(waiting)
            if line is not None:
                self._say(line)


class WatchedRouter(Router):
    """A router whose log says which pairs wait for resources."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        WaitingPairs(logger.warning).start()


def waiting_groups(table: Mapping[str, Mapping[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """Bundles of the pairs of this application that have no place, out of Ray's table."""
    return {
        key: list(group["bundles"].values())
        for key, group in table.items()
        if group["state"] in _WAITS and f"{APP_NAME}#" in group["name"]
    }


def waiting_line(
    waiting: Iterable[list[dict[str, float]]], free: Mapping[str, float]
) -> str | None:
    """The line for the log; None if no pair waits."""
    pairs = list(waiting)
    if not pairs:
        return None
    names = dict.fromkeys(name for bundle in pairs[0] for name in bundle)
    need = {name: sum(bundle.get(name, 0.0) for bundle in pairs[0]) for name in names}
    count = "1 pair waits" if len(pairs) == 1 else f"{len(pairs)} pairs wait"
    asked = [name for name in ("CPU", "GPU") if need.get(name)]
    has = ", ".join(f"{round(free.get(name, 0.0), 4):g} {name}" for name in asked)
    return f"{count} for {in_words(need)} each; free now: {has}"
