"""The pipeline of a job in a thread of its own, so that the job's can be interrupted."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from ray.exceptions import RayError, RayTaskError

from twotower.towers.errors import TwoTowerError, UnavailableError

# Without Ray, which has been shut down by then, a pipeline ends at its next step.
_LAST_STEP_S = 5.0


class Background:
    """Runs work in a thread. Leaving its block waits for the thread, which must have been given a
    reason to end."""

    def __init__(self) -> None:
        self._ended = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begins the work."""

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._failure = error
            finally:
                self._ended.set()

        self._thread = threading.Thread(target=run, name="pipeline", daemon=True)
        self._thread.start()

    def ended(self, wait_s: float) -> bool:
        """Waits for the end; True if it has come. Raises the work's error, Ray's in one line."""
        ended = self._ended.wait(wait_s)
        if ended and self._failure is not None:
            raise as_ours(self._failure) from self._failure
        return ended

    def __enter__(self) -> Background:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is not None:
            self._thread.join(_LAST_STEP_S)


def silence_ray() -> None:
    """Ray Data must not log, with its traces, that it is being stopped."""
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)


def as_ours(error: BaseException) -> BaseException:
    """An error of a pipeline: ours as it is, Ray's in one line."""
    if not isinstance(error, RayError):
        return error
    if isinstance(error, RayTaskError) and isinstance(error.cause, TwoTowerError):
        return error.cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    return UnavailableError(f"the job's pipeline failed: {lines[-1] if lines else error!r}")
