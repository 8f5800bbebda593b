"""A terminal that programs write to, as an emulator shows it."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyte


class Screen:
    """What a terminal of `columns` x `rows` shows of the bytes that it was fed."""

    def __init__(self, columns: int, rows: int) -> None:
        self.shown = pyte.HistoryScreen(columns, rows, history=10_000)
        self._stream = pyte.ByteStream(self.shown)

    def feed(self, data: bytes) -> None:
        self._stream.feed(data)

    def lines(self) -> list[str]:
        """Rows of the screen, without what is empty at their ends and below."""
        rows = [row.rstrip() for row in self.shown.display]
        while rows and not rows[-1]:
            rows.pop()
        return rows

    def all_lines(self) -> list[str]:
        """Rows that have scrolled away, and those of the screen."""
        columns = range(self.shown.columns)
        gone = self.shown.history.top
        return ["".join(row[x].data for x in columns).rstrip() for row in gone] + self.lines()

    @property
    def cursor_is_hidden(self) -> bool:
        return bool(self.shown.cursor.hidden)


@dataclass(frozen=True)
class Ended:
    """A program that has ended: the terminal, all that it was sent, and the exit code."""

    screen: Screen
    sent: bytes
    code: int


def run_in_terminal(
    arguments: list[str],
    columns: int = 60,
    rows: int = 20,
    environment: Mapping[str, str] | None = None,
    watch: Callable[[bytes, subprocess.Popen[bytes], int], None] | None = None,
    program: str | None = None,
    timeout: float = 60.0,
) -> Ended:
    """Runs `python -m arguments`, or `program` with them, with a terminal as its stdin, stdout and
    stderr.

    `watch` gets all that was sent so far, the process and the terminal's descriptor after each
    piece.
    """
    reader, writer = pty.openpty()
    fcntl.ioctl(reader, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")}
    process = subprocess.Popen(
        [sys.executable, *(["-m"] if program is None else ["-c", program]), *arguments],
        stdin=writer,
        stdout=writer,
        stderr=writer,
        env={**kept, "TERM": "xterm-256color", **(environment or {})},
        start_new_session=True,
        preexec_fn=_take_terminal,
    )
    os.close(writer)
    screen, sent, until = Screen(columns, rows), b"", time.monotonic() + timeout
    try:
        while data := _read(reader):
            sent += data
            screen.feed(data)
            if watch is not None:
                watch(sent, process, reader)
            assert time.monotonic() < until, sent[-500:]
        return Ended(screen, sent, process.wait(timeout))
    finally:
        process.kill()
        process.wait()
        os.close(reader)


def _take_terminal() -> None:
    # So that Ctrl-C reaches the program as a signal.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def _read(reader: int) -> bytes:
    try:
        return os.read(reader, 1 << 16)
    except OSError:
        # What Linux says when the last writer has gone.
        return b""
