"""`twotower top`: a service live, from differences of its counters.

Heavy imports happen inside, so that a command brings no more than it needs.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from twotower.cli.progress import is_live

if TYPE_CHECKING:
    from rich.console import Console

    from twotower.cli.readings import StatsClient

LEAST_INTERVAL_S, MOST_INTERVAL_S = 0.1, 3600.0
# Of an output that is no terminal: all columns have room.
_PIPE_COLUMNS = 160


def top(
    target: Annotated[
        str, typer.Option(help="host:port of a service's HTTP side, or its URL.")
    ] = "127.0.0.1:8000",
    api_key: Annotated[
        str | None,
        typer.Option(envvar="TWOTOWER_API_KEY", help="Key of an operator, where one is wanted."),
    ] = None,
    once: Annotated[
        bool, typer.Option("--once", help="Print one table, of one interval, and end.")
    ] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two readings.")] = 2.0,
) -> None:
    """Watch a service: rows, queue, tokens/s and how busy each tower is; q or Ctrl-C ends it."""
    from rich.console import Console

    from twotower.cli.readings import StatsClient
    from twotower.towers.errors import InvalidRequestError

    if not LEAST_INTERVAL_S <= interval <= MOST_INTERVAL_S:
        limits = f"{LEAST_INTERVAL_S:g} to {MOST_INTERVAL_S:g} seconds"
        raise InvalidRequestError("interval", interval, limits)
    live = is_live(sys.stdout)
    console = Console(
        file=sys.stdout,
        force_terminal=live,
        color_system="auto" if live else None,
        width=None if live else _PIPE_COLUMNS,
        highlight=False,
    )
    with closing(StatsClient(target, api_key)) as client:
        if live and not once:
            _watch(client, target, interval, console)
        else:
            _print(client, target, interval, console, once)


def _print(client: StatsClient, target: str, interval: float, console: Console, once: bool) -> None:
    """Prints a table for each interval, or for one."""
    from twotower.cli.tables import page

    before = client.read()
    while True:
        time.sleep(interval)
        now = client.read()
        console.print(page(target, before, now))
        if once:
            return
        before = now


def _watch(client: StatsClient, target: str, interval: float, console: Console) -> None:
    """Shows the table in place until q or Ctrl-C. A service that goes away may come back."""
    from rich.live import Live

    from twotower.cli.tables import page
    from twotower.towers.errors import UnavailableError

    before = now = client.read()
    missing = ""
    live = Live(console=console, screen=True, auto_refresh=False)
    # Ctrl-C is how one leaves, at any moment.
    with suppress(KeyboardInterrupt), _keys() as ended, live:
        while True:
            live.update(page(target, before, now, missing), refresh=True)
            if ended(interval):
                return
            try:
                before, now, missing = now, client.read(), ""
            except UnavailableError as error:
                missing = str(error)


class _Ended:
    """Waits for a while; true if q was pressed."""

    def __init__(self, keyboard: bool) -> None:
        self._keyboard = keyboard

    def __call__(self, seconds: float) -> bool:
        if not self._keyboard:
            time.sleep(seconds)
            return False
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not select.select([sys.stdin], [], [], left)[0]:
                return False
            key = os.read(sys.stdin.fileno(), 1)
            if key == b"q":
                return True
            # At the end of the input there is no key any more.
            self._keyboard = bool(key)
            if not key:
                return self(left)
        return False


@contextmanager
def _keys() -> Iterator[_Ended]:
    """The keyboard key by key and unseen, where there is one; as before afterwards."""
    if sys.stdin is None or not sys.stdin.isatty():
        yield _Ended(keyboard=False)
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin)
    try:
        yield _Ended(keyboard=True)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
