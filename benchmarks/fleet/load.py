"""Clients: chats of several turns, most of them behind a system prompt that they share."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from twotower.deployments.routing.affinity import MOST_STEPS, STEP_TOKENS

BLOCK_TOKENS = 16
VOCABULARY = 130_000
# Tokens at a prompt's beginning that a router looks at.
LOOKED_AT = MOST_STEPS * STEP_TOKENS
# What chats say is cut out of so many drawn tokens.
NOISE = 1 << 20


@dataclass(frozen=True)
class Traffic:
    """What clients ask: the share of chats with one of `systems` shared beginnings, which are as
    popular as Zipf's law says, and the mean numbers of turns and of tokens."""

    systems: int = 300
    shared: float = 0.8
    turns: float = 4.0
    question_tokens: float = 120.0
    answer_blocks: float = 64.0


@dataclass
class Chat:
    """A conversation: the number of the system prompt that it shares and its tokens, where its own
    text begins in the noise, and all tokens so far. `turns` are left."""

    number: int
    system: int | None
    system_tokens: int
    begins: int
    tokens: int
    turns: int


@dataclass(eq=False)
class Request:
    """One turn: `blocks` to write, `committed` of them written by attempts that are over.

    `ends` counts how often it ended, which has to be once; `reissues` how often it went on
    elsewhere after a loss. `silent_since` is when its blocks stopped to come."""

    chat: Chat
    prompt_tokens: int
    blocks: int
    came: float
    number: int
    committed: int = 0
    reissues: int = 0
    ends: int = 0
    first_block_at: float | None = None
    silent_since: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt and output so far: what an attempt has to read."""
        return self.prompt_tokens + self.committed * BLOCK_TOKENS


@dataclass
class Clients:
    """The next request whenever one ends: that of the chat that has rested for the longest time."""

    traffic: Traffic
    draw: random.Random
    _resting: deque[Chat] = field(default_factory=deque)
    _numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        draw, traffic = self.draw, self.traffic
        noise = np.random.default_rng(draw.randrange(2**32))
        self._noise = tuple(noise.integers(0, VOCABULARY, NOISE).tolist())
        self._systems = [
            self._text(draw.randrange(NOISE // 2), draw.randint(200, 2000))
            for _ in range(traffic.systems)
        ]
        self._weights = [1.0 / (rank + 1) for rank in range(traffic.systems)]
        self._chats = count()

    def fill(self, chats: int) -> None:
        """Chats that rest before the first request."""
        self._resting.extend(self._new_chat() for _ in range(chats))

    def next_request(self, now: float) -> Request:
        """A turn of the chat that has rested for the longest time."""
        chat = self._resting.popleft() if self._resting else self._new_chat()
        draw, traffic = self.draw, self.traffic
        chat.tokens += 1 + int(draw.expovariate(1.0 / traffic.question_tokens))
        blocks = math.ceil(draw.expovariate(1.0 / traffic.answer_blocks)) or 1
        return Request(chat, chat.tokens, blocks, now, next(self._numbers))

    def ended(self, request: Request) -> None:
        """The answer is part of the chat, which rests; after its last turn another begins."""
        chat = request.chat
        chat.tokens = request.tokens
        chat.turns -= 1
        self._resting.append(chat if chat.turns > 0 else self._new_chat())

    def prompt(self, request: Request) -> tuple[int, ...]:
        """The beginning of a request's prompt, as far as routers look at it."""
        chat = request.chat
        own = min(LOOKED_AT, request.prompt_tokens) - chat.system_tokens
        text = self._text(chat.begins, max(0, own))
        return text if chat.system is None else self._systems[chat.system] + text

    def _new_chat(self) -> Chat:
        draw, traffic = self.draw, self.traffic
        turns = 1 + int(draw.expovariate(1.0 / max(traffic.turns - 1.0, 1e-9)) + 0.5)
        number, begins = next(self._chats), NOISE // 2 + draw.randrange(NOISE // 2 - LOOKED_AT)
        if draw.random() >= traffic.shared:
            return Chat(number, None, 0, begins, 0, turns)
        (system,) = draw.choices(range(traffic.systems), self._weights)
        tokens = len(self._systems[system])
        return Chat(number, system, tokens, begins, tokens, turns)

    def _text(self, begins: int, tokens: int) -> tuple[int, ...]:
        return self._noise[begins : begins + tokens]
