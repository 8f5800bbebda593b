"""Runs the service in a child process that can be ended in every state, with all below it.

Ray lives inside the process that starts it: if its programs die, that process may hang, and Ray has
its own idea of signals. So the process that a user sees holds no Ray. It takes the signals, watches
what the service cannot go on without, and adopts every orphan below it (Linux' subreaper), so that
nothing is left when it ends.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from twotower.cluster.placement.surroundings import read_by_ray
from twotower.towers.errors import TwoTowerError

# Names of Ray's programs that are started once and that nothing replaces.
VITAL = frozenset({"gcs_server", "raylet"})
TICK_S = 0.25
# A service that starts or stops may have ended Ray by itself, and say so itself.
LOST_PATIENCE_S = 4.0
# Time of ending beside that of the streams. With the default of 20 s for them it stays below
# the 30 s that operators commonly leave between SIGTERM and SIGKILL.
STOP_MARGIN_S = 6.0
# Processes that hold a GPU take a moment to die.
_KILL_TIMEOUT_S = 15.0
_FAILED = 1
# The child says that it is ready by a dot, and then may send an error: a pickle begins otherwise.
_READY = b"."
# Errors that a user can mend. All others keep the traceback that they have in the child.
_PASSED_ON = (TwoTowerError, ValueError, OSError)
# Bytes that a pipe takes while it is not read.
_PIPE_BYTES = 1 << 16
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


Work = Callable[[Callable[[], None]], int]


@dataclass(frozen=True)
class _HeldSignals:
    """Signals that end the service, held back until `supervise` takes them."""

    kinds: frozenset[signal.Signals]
    mask: set[int]


@contextmanager
def held_signals() -> Iterator[_HeldSignals]:
    """Holds the signals back, so that none ends this process between two steps of its start."""
    kinds = {signal.SIGINT, signal.SIGTERM}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        kinds.add(signal.SIGHUP)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*kinds, signal.SIGCHLD})
    try:
        yield _HeldSignals(frozenset(kinds), set(mask))
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def supervise(work: Work, grace_s: float, held: _HeldSignals) -> int:
    """Runs `work(ready)` in a child process and returns the exit code for this one.

    `work` calls `ready` once SIGTERM ends it gracefully, within `grace_s` and a margin. Before that
    a signal ends everything at once, with 128 and the signal's number. 1 if the child or Ray died.
    Raises what `work` raised if it is for the user.
    """
    # The parent of this process may have it ignored, and then no child could be waited for.
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reader, writer = os.pipe()
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _work(work, writer, parent, held.mask)
    os.close(writer)
    try:
        return _Supervisor(child, reader, held.kinds, grace_s).run()
    finally:
        _end_descendants()
        os.close(reader)
        # Orphans that come later would wait for a parent that is gone.
        _prctl(_PR_SET_CHILD_SUBREAPER, 0)
        signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)


class _Supervisor:
    """The parent's side: waits for whatever comes first."""

    def __init__(
        self, child: int, reader: int, signals: frozenset[signal.Signals], grace_s: float
    ) -> None:
        self._child = child
        self._reader = reader
        self._signals = signals
        self._stop_s = grace_s + STOP_MARGIN_S
        self._vital: dict[int, tuple[str, str]] = {}
        self._lost: str | None = None
        self._signal: int | None = None
        self._deadline = float("inf")
        os.set_blocking(reader, False)
        self._told = b""

    def run(self) -> int:
        """The exit code; raises the child's error. Leaves processes behind."""
        while True:
            received = signal.sigtimedwait({*self._signals, signal.SIGCHLD}, TICK_S)
            code = self._ended()
            if code is not None:
                return self._outcome(code)
            if received is not None and received.si_signo in self._signals:
                again = self._signal is not None and received.si_signo == signal.SIGINT
                self._signal = self._signal or received.si_signo
                if again or not self._is_ready():
                    return 128 + received.si_signo
                self._stop()
            self._watch()
            if time.monotonic() >= self._deadline:
                if self._lost is not None and self._signal is not None:
                    # Ray was ended as well, as systemd does by default.
                    return 128 + self._signal
                return self._failed(f"the service has not stopped within {self._stop_s:g} s")

    def _is_ready(self) -> bool:
        with suppress(BlockingIOError):
            self._told += os.read(self._reader, _PIPE_BYTES)
        return self._told.startswith(_READY)

    def _stop(self) -> None:
        os.kill(self._child, signal.SIGTERM)
        self._deadline = min(self._deadline, time.monotonic() + self._stop_s)

    def _ended(self) -> int | None:
        """The child's code once it has ended (negative: a signal's number); reaps orphans, too."""
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == self._child:
                return os.waitstatus_to_exitcode(status)
            if process == 0:
                return None

    def _outcome(self, code: int) -> int:
        self._is_ready()
        if error := self._told.removeprefix(_READY):
            # From this very program, through a pipe that no other process has.
            raise pickle.loads(error)
        if code >= 0 and (code != 0 or self._lost is None or self._signal is not None):
            return code
        return self._failed(f"the service's process was ended by {_signal_name(-code)}")

    def _failed(self, otherwise: str) -> int:
        """Says in a line what went wrong: what was lost, or `otherwise`."""
        line = self._lost or otherwise
        if (names := read_by_ray(os.environ)) and not self._is_ready():
            line += f" (the environment has {', '.join(names)})"
        _say(line)
        return _FAILED

    def _watch(self) -> None:
        """Notes the first death of what the service cannot go on without."""
        if len(self._vital) < len(VITAL):
            for process in _descendants():
                name, _, _, began = _stat(process)
                if name in VITAL:
                    self._vital[process] = name, began
        for process, (name, began) in self._vital.items():
            _, state, _, now = _stat(process)
            if self._lost is None and (state in ("", "Z") or now != began):
                self._lost = f"a process that the service needs has ended: {name} ({process})"
                served = self._is_ready() and self._signal is None
                # A signal for all may reach Ray's program first.
                patience = TICK_S if served else LOST_PATIENCE_S
                self._deadline = min(self._deadline, time.monotonic() + patience)


def _work(work: Work, writer: int, parent: int, mask: set[int]) -> None:
    """The child's side; never returns."""
    code = _FAILED
    try:
        # A group of its own: what the terminal sends goes to the parent, which decides.
        os.setsid()
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = work(lambda: _tell(writer, _READY))
    except _PASSED_ON as error:
        _pass_on(error, writer)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else _FAILED
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def _tell(writer: int, what: bytes) -> None:
    os.write(writer, what)


def _pass_on(error: Exception, writer: int) -> None:
    try:
        pickled = pickle.dumps(error)
        # Some can be written and not read: those that take other arguments than they have.
        pickle.loads(pickled)
    except Exception:
        pickled = pickle.dumps(ValueError(str(error)))
    if len(pickled) < _PIPE_BYTES:
        _tell(writer, pickled)
    else:
        traceback.print_exception(error)


def _end_descendants() -> None:
    """Kills every process below this one and waits for it.

    A look at /proc may miss some while others die. A process that loses its parent becomes a
    child of this one, so there is none left when there is no child left.
    """
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while not _reaped():
        left = _descendants()
        for process in left:
            _kill(process)
        if time.monotonic() > deadline:
            _say(f"these processes do not end: {', '.join(map(str, left))}")
            return
        time.sleep(0.02)


def _reaped() -> bool:
    """Takes the codes of children that have ended; whether there is no child any more."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        return True
    return False


def _kill(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants() -> list[int]:
    children: dict[int, list[int]] = {}
    for process in _processes():
        children.setdefault(_stat(process)[2], []).append(process)
    found, waiting = [], [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _stat(process: int) -> tuple[str, str, int, str]:
    """A process's name, state, parent and time of birth; empty if it is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_bytes().decode(errors="replace")
    except OSError:
        return "", "", 0, ""
    # The name may hold anything, brackets too.
    name, _, rest = text.partition("(")[2].rpartition(")")
    fields = rest.split()
    return name, fields[0], int(fields[1]), fields[19]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _say(what: str) -> None:
    print(f"error: {what}", file=sys.stderr, flush=True)


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    # All of them as wide as the kernel takes them: a C function of any number of arguments.
    arguments = (ctypes.c_ulong(number) for number in (value, 0, 0, 0))
    if libc.prctl(option, *arguments):
        raise OSError(ctypes.get_errno(), f"prctl({option})")
