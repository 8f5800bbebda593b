"""What a client asks for, whatever the protocol: decoded, and checked only in itself."""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass, field, replace

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import MAX_CHOICES as MAX_CHOICES
from twotower.towers.request.params import SEED_BITS, GenerationParams

MAX_REQUEST_ID = 128
_REQUEST_ID = re.compile(rf"[!-~]{{1,{MAX_REQUEST_ID}}}")

# A text, or token ids.
Input = str | list[int]


class NotServedError(InvalidRequestError):
    """A request asks for another model than the one that is served."""


@dataclass(frozen=True)
class CompletionRequest:
    """A prompt, and the parameters of its `n` completions.

    `generated` are tokens of an earlier stream, which this one goes on after. `caller` names the
    key that was used, `traceparent` is the request's W3C trace context, and `arrived` the monotonic
    time at which it came. Raises InvalidRequestError on construction for more choices than a
    request may have, and for several that are to go on.
    """

    request_id: str
    prompt: Input
    params: GenerationParams
    generated: tuple[int, ...] = ()
    n: int = 1
    caller: str = ""
    traceparent: str | None = None
    arrived: float = field(default_factory=time.monotonic, compare=False)

    def __post_init__(self) -> None:
        check_whole("n", self.n, 1, MAX_CHOICES)
        if self.n > 1 and self.generated:
            raise InvalidRequestError("n", self.n, "1 with generated_token_ids")

    def choices(self) -> list[GenerationParams]:
        """The parameters of each completion, which differ in their seeds alone."""
        first = self.params.with_seed()
        assert first.seed is not None
        seeds = [choice_seed(first.seed, index) for index in range(self.n)]
        return [replace(first, seed=seed) for seed in seeds]


def choice_seed(seed: int, index: int) -> int:
    """The seed of a choice: the request's own for the first, hashes of it for the others. A request
    for that seed alone gives that choice."""
    if not index:
        return seed
    digest = hashlib.blake2b(f"{seed}/choice/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> (64 - SEED_BITS)


def request_id_of(given: str, field: str = "request_id") -> str:
    """The client's name for a request, or a drawn one. Raises InvalidRequestError."""
    if not given:
        return secrets.token_hex(8)
    if not _REQUEST_ID.fullmatch(given):
        limit = f"at most {MAX_REQUEST_ID} printable ASCII characters without spaces"
        raise InvalidRequestError(field, given, limit)
    return given
