"""Task scores: what an output is worth, beside how likely it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from twotower.sweep.prompts import SweepPrompt
from twotower.towers.errors import InvalidRequestError

# Prompt, output and reference (None without one) to a score, 1 for right and 0 for wrong.
Scorer = Callable[[str, str, str | None], float]


def next_line(_prompt: str, output: str, reference: str | None) -> float:
    """1 if the output's first line that is not empty is the reference's."""
    return float(_first_line(output) == _first_line(reference or ""))


def exact(_prompt: str, output: str, reference: str | None) -> float:
    """1 if the output is the reference, but for space around them."""
    return float(output.strip() == (reference or "").strip())


SCORERS: dict[str, Scorer] = {"next_line": next_line, "exact": exact}


def scorers_named(names: Sequence[str], prompts: Sequence[SweepPrompt]) -> dict[str, Scorer]:
    """Scorers by the name of their column: next_line, exact, or `module:function`. Raises
    InvalidRequestError for an unknown one, and for prompts without the reference that it needs."""
    found = {}
    for name in names:
        scorer = SCORERS.get(name)
        if scorer is None:
            found[name.rpartition(":")[2]] = _imported(name)
            continue
        lacking = [index for index, prompt in enumerate(prompts) if prompt.reference is None]
        if lacking:
            without = f"prompt {lacking[0]} without a reference"
            raise InvalidRequestError("score", name, f"a reference for each prompt ({without})")
        found[name] = scorer
    return found


def _imported(name: str) -> Scorer:
    module, colon, function = name.partition(":")
    known = f"one of none, {', '.join(SCORERS)}, or module:function"
    if not colon:
        raise InvalidRequestError("score", name, known)
    try:
        scorer = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InvalidRequestError("score", name, f"{known} ({error})") from None
    if not callable(scorer):
        raise InvalidRequestError("score", name, "a function")
    return scorer  # type: ignore[no-any-return]


def _first_line(text: str) -> str:
    lines = (line.rstrip() for line in text.split("\n"))
    return next((line for line in lines if line), "")
