"""Clients: chats of several turns, most of them behind a system prompt that they share."""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count

from twotower.deployments.routing.policy import PREFIX_TOKENS

BLOCK_TOKENS = 16
VOCABULARY = 130_000


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
    """A conversation: the beginning of its prompts, the system prompt that it shares (its number
    and tokens), and all tokens so far. `turns` are left."""

    number: int
    prefix: tuple[int, ...]
    system: int | None
    system_tokens: int
    tokens: int
    turns: int


@dataclass(eq=False)
class Request:
    """One turn: `blocks` to write, `committed` of them written; `attempts` began.

    `ends` counts how often it ended, which has to be once."""

    chat: Chat
    prompt_tokens: int
    blocks: int
    came: float
    number: int
    committed: int = 0
    attempts: int = 0
    reissues: int = 0
    ends: int = 0
    first_block_at: float | None = None

    @property
    def tokens(self) -> int:
        """Prompt and output so far: what an attempt has to read."""
        return self.prompt_tokens + self.committed * BLOCK_TOKENS


@dataclass
class Clients:
    """The next request whenever one ends: chats take turns, so that as many rest as are served."""

    traffic: Traffic
    draw: random.Random
    _resting: deque[Chat] = field(default_factory=deque)
    _numbers: count[int] = field(default_factory=count)

    def __post_init__(self) -> None:
        draw, traffic = self.draw, self.traffic
        self._systems = [
            (self._prefix(), draw.randint(200, 2000)) for _ in range(traffic.systems)
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

    def _new_chat(self) -> Chat:
        draw, traffic = self.draw, self.traffic
        turns = 1 + int(draw.expovariate(1.0 / max(traffic.turns - 1.0, 1e-9)) + 0.5)
        if draw.random() < traffic.shared:
            (system,) = draw.choices(range(traffic.systems), self._weights)
            prefix, tokens = self._systems[system]
            return Chat(next(self._chats), prefix, system, tokens, tokens, turns)
        return Chat(next(self._chats), self._prefix(), None, 0, PREFIX_TOKENS, turns)

    def _prefix(self) -> tuple[int, ...]:
        return tuple(self.draw.choices(range(VOCABULARY), k=PREFIX_TOKENS))
