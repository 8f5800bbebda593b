"""Draws short requests for a soak: every mode, shared prefixes, some to be cancelled midway."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams

# Pieces in which prompts are read, short enough that prompts have several.
PIECE = 64
MAX_PROMPT, MAX_NEW = 80, 24
CANCELLED_SHARE, CHECKED_SHARE = 0.2, 0.01
MODES: dict[Mode, float] = {"mask_diffusion": 0.5, "verified": 0.25, "ar": 0.15, "mock_ar": 0.1}
BLOCK_SIZES = (4, 8)
# Longest delay behind the start of a phase, in seconds: about as long as the phase itself.
DELAYS = {
    "queued": 0.3,
    "prefill": 0.01,
    "denoising": 0.01,
    "extension": 0.01,
    "transfer": 0.002,
}
_COMMON_PREFIXES, _COMMON_PROMPTS = 12, 24


@dataclass(frozen=True)
class Cancel:
    """Cancel `delay` seconds after the row enters `phase` for the `entry`-th time, from 1."""

    phase: str
    entry: int
    delay: float


@dataclass(frozen=True)
class SoakRequest:
    """A row to generate; `checked` ones are generated again alone."""

    prompt: tuple[int, ...]
    params: GenerationParams
    cancel: Cancel | None
    checked: bool


class RequestMaker:
    """Draws requests, the same for the same seed."""

    def __init__(self, vocab_size: int, eos_token_id: int, seed: int) -> None:
        self._draw = random.Random(seed)
        self._vocab_size = vocab_size
        self._eos_token_id = eos_token_id
        self._prefixes = [self._tokens(PIECE) for _ in range(_COMMON_PREFIXES)]
        self._prompts = [self._tokens(1 + 3 * index) for index in range(_COMMON_PROMPTS)]

    def requests(self, count: int) -> Iterator[SoakRequest]:
        """The next `count` requests."""
        for _ in range(count):
            prompt, params = self._prompt(), self._params()
            cancel = self._cancel(params) if self._draw.random() < CANCELLED_SHARE else None
            checked = self._draw.random() < CHECKED_SHARE
            yield SoakRequest(prompt, params, cancel, checked)

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._draw.randrange(4, self._vocab_size) for _ in range(count))

    def _prompt(self) -> tuple[int, ...]:
        """A common prompt, a continuation of a common prefix, or a new prompt."""
        kind = self._draw.random()
        if kind < 0.2:
            return self._draw.choice(self._prompts)
        if kind < 0.6:
            rest = self._draw.randint(0, MAX_PROMPT - PIECE)
            return self._draw.choice(self._prefixes) + self._tokens(rest)
        return self._tokens(self._draw.randint(1, MAX_PROMPT))

    def _params(self) -> GenerationParams:
        draw = self._draw
        return GenerationParams(
            mode=draw.choices(list(MODES), list(MODES.values()))[0],
            max_tokens=draw.randint(1, MAX_NEW),
            block_size=draw.choice(BLOCK_SIZES),
            steps_per_block=draw.choice((2, 4, 8)),
            draft_steps=draw.choice((1, 2, 4)),
            temperature=draw.choice((0.0, 0.0, 0.7, 1.0)),
            top_p=draw.choice((None, 0.9)),
            top_k=draw.choice((None, 20)),
            seed=draw.getrandbits(32),
            eos_token_id=draw.choice((None, self._eos_token_id)),
        )

    def _cancel(self, params: GenerationParams) -> Cancel:
        phase = self._draw.choice(phases_of(params))
        many = phase in ("denoising", "extension", "transfer")
        entry = self._draw.randint(1, 2) if many and params.max_tokens > MAX_NEW // 2 else 1
        return Cancel(phase, entry, self._draw.random() * DELAYS[phase])


def phases_of(params: GenerationParams) -> tuple[str, ...]:
    """The phases that a row passes through unless an EOS ends it before."""
    if params.mode == "ar":
        return ("queued", "prefill", "denoising")
    extended = params.mode == "verified" or params.max_tokens > params.block_size
    if params.mode == "mock_ar":
        extended = params.max_tokens > 1
    return tuple(DELAYS) if extended else ("queued", "prefill", "denoising", "transfer")
