"""What a command is doing, on stderr, where that is a terminal and the work takes over two seconds.

In a pipe, with NO_COLOR or TERM=dumb nothing is shown. Of rich nothing is imported before something
is shown.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, TextIO

import typer

if TYPE_CHECKING:
    from rich.progress import Progress, ProgressColumn, TaskID

# What is shown of an amount: per cent, bytes, or how many of how many.
Unit = Literal["share", "bytes", "pieces"]
SHOWN_AFTER_S = 2.0
# Erases the line of the cursor, and shows the cursor.
_RESTORED = "\r\x1b[K\x1b[?25h"


def is_live(stream: TextIO | None) -> bool:
    """True for a terminal on which text may be written over."""
    return (
        stream is not None
        and stream.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM", "") not in ("", "dumb", "unknown")
    )


def restore_terminal() -> None:
    """Erases the bar of a process that was killed, and shows the cursor that it has hidden."""
    if is_live(sys.stderr):
        sys.stderr.write(_RESTORED)
        sys.stderr.flush()


@contextmanager
def working(what: str, unit: Unit = "share", *, wanted: bool = True) -> Iterator[Bar]:
    """Shows a bar while the block runs, once two seconds are over. `what` names the work, `unit`
    its amounts; not `wanted`, there is none."""
    bar = Bar(what, unit)
    timer = threading.Timer(SHOWN_AFTER_S, bar.show)
    timer.daemon = True
    if wanted and is_live(sys.stderr):
        timer.start()
    try:
        yield bar
    finally:
        timer.cancel()
        bar.end()


@contextmanager
def hub_bars() -> Iterator[None]:
    """Lets the hub's client show its own bars on a terminal, and none elsewhere. What
    HF_HUB_DISABLE_PROGRESS_BARS says goes first."""
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not is_live(sys.stderr):
        with disable_progress_bars():
            yield
    else:
        yield


class Bar:
    """A bar that is not shown until `show`. Calling it sets how much of how much is done, and what
    is next; without an amount it only moves. From any thread."""

    def __init__(self, what: str, unit: Unit) -> None:
        self._what = what
        self._unit = unit
        self._done = 0.0
        self._total: float | None = None
        self._note = ""
        self._lock = threading.RLock()
        self._ended = False
        self._shown: Progress | None = None
        self._task: TaskID | None = None

    def __call__(self, done: float, total: float | None, note: str = "") -> None:
        """`done` of `total` (None: unknown) is done; `note` says what is worked on."""
        with self._lock:
            again = done < self._done
            self._done, self._total, self._note = done, total, note
            if self._shown is None or self._task is None:
                return
            if again:
                # Another piece of work, with a speed of its own.
                self._shown.reset(self._task)
            self._shown.update(
                self._task, total=total, completed=done, description=self._description()
            )

    def note(self, text: str) -> None:
        """Says what is worked on, of an amount that is not known."""
        self(0, None, text)

    def say(self, line: str) -> None:
        """Prints a line to stdout, above the bar where both are on one terminal."""
        with self._lock:
            if self._shown is None or not is_live(sys.stdout):
                typer.echo(line)
                return
            from rich.segment import Segment, Segments

            # As it is: rich would break it between words.
            self._shown.console.print(Segments([Segment(f"{line}\n")]), end="", soft_wrap=True)

    def show(self) -> None:
        """Begins to show the bar, unless the work has ended."""
        from rich.console import Console
        from rich.progress import Progress

        with self._lock:
            if self._ended:
                return
            console = Console(file=sys.stderr, force_terminal=True, highlight=False)
            shown = Progress(
                *_columns(self._unit), console=console, transient=True, redirect_stdout=False
            )
            self._task = shown.add_task(
                self._description(), total=self._total, completed=int(self._done)
            )
            shown.update(self._task, completed=self._done)
            shown.start()
            self._shown = shown

    def end(self) -> None:
        """Takes the bar away."""
        with self._lock:
            self._ended = True
            if self._shown is not None:
                self._shown.stop()
                self._shown = None

    def _description(self) -> str:
        return f"{self._what}: {self._note}" if self._note else self._what


def _columns(unit: Unit) -> list[ProgressColumn]:
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    amounts: dict[Unit, ProgressColumn] = {
        "share": TaskProgressColumn(),
        "bytes": DownloadColumn(binary_units=True),
        "pieces": MofNCompleteColumn(),
    }
    text = TextColumn("{task.description}", markup=False)
    remaining = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    return [text, BarColumn(bar_width=20), amounts[unit], remaining]
