"""Errors and exit codes of the command line: an error of the user's is one line on stderr.

Exit code 2 is for arguments, files and models that are wrong, 1 for an output that cannot be
written, 130 for Ctrl-C. A reader that has gone (`| head -1`) ends a command quietly, with 1.
Anything else is a fault of this program, and keeps its traceback.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from twotower.towers.errors import TwoTowerError, cut_off, shorten

WRONG, UNWRITTEN, INTERRUPTED = 2, 1, 130
# Beyond this a line is no help.
_MOST_CHARACTERS = 600


class CommandGroup(TyperGroup):
    """The commands, with their errors in one line."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        *_: Any,
        **extra: Any,
    ) -> Any:
        """Parses the arguments, runs a command and ends the process."""
        given = list(sys.argv[1:] if args is None else args)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # What the terminal has no characters for is shown by numbers.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            _check_text(given)
            extra["standalone_mode"] = False
            code = super().main(given, prog_name, **extra)
            if sys.stdout is not None:
                sys.stdout.flush()
        except BrokenPipeError:
            _give_up_stdout()
            sys.exit(UNWRITTEN)
        except Exception as error:
            sys.exit(_shown(error))
        if code == INTERRUPTED:
            _say("interrupted")
        sys.exit(code if isinstance(code, int) else 0)


def _check_text(arguments: Sequence[str]) -> None:
    for index, argument in enumerate(arguments):
        try:
            argument.encode("utf-8")
        except UnicodeEncodeError:
            name, value = _named(index, arguments)
            shown = "a key" if name == "--api-key" else shorten(value)
            raise ValueError(f"{name}: got {shown}, expected UTF-8") from None


def _named(index: int, arguments: Sequence[str]) -> tuple[str, str]:
    """Name of an argument's option, and its value, before the arguments are parsed."""
    argument, before = arguments[index], arguments[index - 1] if index else ""
    option, equals, value = argument.partition("=")
    if equals and option.startswith("--") and option.isprintable():
        return option, value
    return before if before.startswith("--") else f"argument {index + 1}", argument


def _shown(error: Exception) -> int:
    """Prints an error and returns the exit code. Raises it again if it is not the user's."""
    if hasattr(error, "format_message") and hasattr(error, "exit_code"):
        return _shown_usage(error)
    if isinstance(error, OSError):
        # Before ValueError: some are both.
        _say(f"error: {_os_error(error)}")
        _give_up_stdout()
        return UNWRITTEN
    if isinstance(error, TwoTowerError | ValueError):
        _say(f"error: {error}")
        return WRONG
    if _is_out_of_memory(error):
        _say(
            f"error: not enough memory ({str(error).splitlines()[0] if str(error) else 'no more'})"
        )
        return UNWRITTEN
    raise error


def _is_out_of_memory(error: Exception) -> bool:
    """True for MemoryError and for what torch raises: a class for GPUs, a RuntimeError on a CPU."""
    is_torch = isinstance(error, RuntimeError) and "allocate memory" in str(error)
    return isinstance(error, MemoryError) or is_torch or type(error).__name__ == "OutOfMemoryError"


def _shown_usage(error: Any) -> int:
    """An error of the parser; without any arguments it is the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
    else:
        name = error.ctx.command_path if getattr(error, "ctx", None) else "twotower"
        _say(f"error: {error.format_message()} See `{name} --help`.")
    return int(error.exit_code)


def _os_error(error: OSError) -> str:
    reason = error.strerror or type(error).__name__
    return reason if error.filename is None else f"{error.filename}: {reason}"


def _say(text: str) -> None:
    """One line, whatever is in it."""
    line = "".join(part if part.isprintable() else ascii(part)[1:-1] for part in text)
    typer.echo(cut_off(line, _MOST_CHARACTERS), err=True)


def _give_up_stdout() -> None:
    """Python would write what is left once more at its end, and complain."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
