"""The commit log of a request: a block that is appended to it is committed."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.towers.decoding.services import Block
from twotower.towers.errors import UnavailableError
from twotower.towers.request.params import FinishReason, GenerationParams
from twotower.towers.request.results import Usage


class CommitLog:
    """Appends blocks in order of position; a committed token never changes.

    The log begins after `prompt_tokens` tokens of the prompt and the `generated` tokens of an
    earlier stream. Counts are sums over its blocks, whichever attempt at the request made them.
    """

    def __init__(self, prompt_tokens: int, generated: Sequence[int]) -> None:
        self.prompt_tokens = prompt_tokens
        self._token_ids = list(generated)
        self.num_blocks = 0
        self.nfe = 0
        self.context_passes = 0
        self.accepted_tokens = 0
        self.drafted_tokens = 0
        self.lookup_accepted_tokens = 0
        self.lookup_drafted_tokens = 0
        self.cached_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._eased: float | None = None

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All output tokens so far."""
        return tuple(self._token_ids)

    @property
    def end(self) -> int:
        """Absolute position of the next token."""
        return self.prompt_tokens + len(self._token_ids)

    @property
    def usage(self) -> Usage:
        """Cost of the committed blocks."""
        return Usage(
            self.prompt_tokens,
            len(self._token_ids),
            self.nfe,
            self.context_passes,
            self.cached_tokens,
            self.accepted_tokens,
            self.drafted_tokens,
            self.lookup_accepted_tokens,
            self.lookup_drafted_tokens,
        )

    def served(self, asked: GenerationParams) -> GenerationParams:
        """Parameters that the blocks are made with: as asked, until the first block says how far
        they are eased."""
        return asked if self._eased is None else asked.eased(self._eased)

    def has(self, block: Block) -> bool:
        """True if the block is committed already; otherwise it is the next block.

        Raises UnavailableError for a gap: the attempt that it came from cannot go on.
        """
        if block.start > self.end:
            raise UnavailableError(
                f"a block is missing: got one at {block.start}, expected {self.end}; try again"
            )
        return block.start < self.end

    def append(self, block: Block) -> bool:
        """Commits a block that starts at `end`; False for one that is committed already.

        Raises UnavailableError for a gap.
        """
        if self.has(block):
            return False
        self._token_ids.extend(block.token_ids)
        if not self.num_blocks:
            # A later attempt finds more in the cache, also of the output; the request has saved
            # what its first attempt found of the prompt.
            self.cached_tokens = min(block.cached_tokens, self.prompt_tokens)
            self._eased = block.eased
        self.num_blocks += 1
        self.nfe += block.nfe
        self.context_passes += block.context_passes
        self.accepted_tokens += block.accepted_tokens
        self.drafted_tokens += block.drafted_tokens
        self.lookup_accepted_tokens += block.lookup_accepted_tokens
        self.lookup_drafted_tokens += block.lookup_drafted_tokens
        self.finish_reason = block.finish_reason
        return True
