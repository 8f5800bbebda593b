"""Tokens that drafts yield which the context tower checks: those of lookups and of a denoiser.

A round of lookups is one pass of the context tower over a row's last token and what followed it
where it stood before; a row whose last token is new has a round of one token. A cycle is a draft of
one denoiser pass and its check by one pass of the context tower. Both yield what is accepted and
one token more, and the text of `ar`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower.planner.schedules import BLOCK

Drafter = Literal["lookup", "denoiser"]


@dataclass(frozen=True)
class Yield:
    """Tokens that a round or cycle yields in the mean, and where the figure comes from."""

    name: str
    drafter: Drafter
    tokens: float
    source: str


# No lookup has been measured on a 30B model. The first is the default of a question: text that is
# drawn at a temperature hardly loops, and loops are what flatters lookups most.
LOOKUP_TOKENS = 1.6
# Of the same model: own drafts with strict acceptance, in the list below.
CYCLE_TOKENS = 3.1
_OWN = "the shipped model of 10 million parameters, held-out Python, drafts of 15 tokens"
KNOWN = (
    Yield("lookups, T = 0.7", "lookup", 1.61, f"measured: {_OWN}, temperature 0.7"),
    Yield("lookups, greedy, no loops", "lookup", 2.20, f"measured: {_OWN}, outputs that loop out"),
    Yield("lookups, greedy", "lookup", 3.33, f"measured: {_OWN}, of which seven in ten loop"),
    Yield("drafts, own", "denoiser", 3.1, f"measured: {_OWN}, greedy, strict acceptance"),
    Yield("drafts, own, mix", "denoiser", 3.3, f"measured: {_OWN}, greedy, mix of 0.3"),
    Yield(
        "drafts, DFlash",
        "denoiser",
        5.48,
        "published (arXiv 2602.06036), from notes about it: Qwen3-8B at temperature 1, a drafter "
        "of 5 layers that reads the target's states, blocks of 16; 6.49 at temperature 0",
    ),
    Yield(
        "drafts, LoRA",
        "denoiser",
        6.82,
        "published (arXiv 2607.05722), from a summary of it: one model in both roles, a LoRA in "
        "that of the drafter, drafts of 31",
    ),
)


def accept_rate(tokens: float) -> float:
    """The chance of each drafted token, given that those before it were accepted, at which a draft
    of BLOCK - 1 tokens yields `tokens` (1 to BLOCK) in the mean."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if yielded(middle, BLOCK) < tokens else (low, middle)
    return (low + high) / 2


def yielded(rate: float, length: int) -> float:
    """Tokens that a pass over `length` tokens of a row yields, all but the first of them drafted
    and each accepted with `rate`."""
    return sum(rate**place for place in range(length))
