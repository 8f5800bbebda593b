"""Work of a row for a pass of the context tower, and its result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from twotower.towers.decoding.acceptance import Checked, MixedDraft
from twotower.towers.decoding.sampling import Draw, Drawn
from twotower.towers.decoding.services import TopLogProbs
from twotower.towers.engine.buckets import MAX_LENGTH
from twotower.towers.errors import NumericalError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter


@dataclass(frozen=True)
class ContextWork:
    """Tokens of a row to read. `advance` moves the snapshot over them, otherwise they stay in the
    log; `draw` draws at the last of them, `targets` asks for these tokens' log-probabilities and
    `top_logprobs` for so many most probable tokens beside each, `logits` for those of every token,
    `sink` takes the update's shares. `prefill` is a piece of a prompt.

    With `mixed` the draw is the check of that draft, and gives no tokens by itself. Its first line
    is then that of the hidden state `before` [H], if there is one: of the token before the work's,
    which an earlier pass has read.

    With `accepts` the tokens after the first are a draft that is checked strictly: the pass may
    move the snapshot over the first and over those that are drawn as well, all rows' at once; where
    it has not, the state's position stands where it stood."""

    state: ContextState
    tokens: Sequence[int]
    advance: bool = True
    draw: Draw | None = None
    targets: Sequence[int] | None = None
    sink: UpdateWriter | None = None
    prefill: bool = False
    top_logprobs: int = 0
    logits: bool = False
    mixed: MixedDraft | None = None
    before: Tensor | None = None
    accepts: bool = False

    @property
    def is_step(self) -> bool:
        """True if it reads one token into the state, draws the next and no more."""
        plain = self.advance and self.targets is None and self.sink is None
        return plain and len(self.tokens) == 1 and self._draws(1)

    def moved_by(self, drawn: Drawn | None) -> int:
        """Tokens over which a pass that has drawn these moves the snapshot."""
        if self.advance:
            return len(self.tokens)
        if not self.accepts or drawn is None:
            return 0
        return 1 + leading_equal(self.tokens[1:], drawn.token_ids)

    @property
    def may_wait(self) -> bool:
        """True if it may wait for more of its kind, see `turns`: blocks, whatever they draw."""
        extends = self.advance and (self.draw is None or len(self.tokens) > 1)
        extends = extends and not self.prefill and self.targets is None
        return extends or (self.is_block and not self.is_step)

    @property
    def is_block(self) -> bool:
        """True if it extends a row by a committed block, and may draw the token after it, or checks
        a whole draft."""
        if self.prefill or self.targets is not None or len(self.tokens) > MAX_LENGTH:
            return False
        if self.advance:
            return self.draw is None or self._draws(1)
        return self.sink is None and self._draws(len(self.tokens))

    def _draws(self, count: int) -> bool:
        """True if it draws so many tokens, which needs no host."""
        draw = self.draw
        if draw is None or self.mixed is not None:
            return False
        return len(draw.positions) == count and draw.sampler.plain


@dataclass(frozen=True)
class ContextResult:
    """A row's last hidden state [H], the tokens that were drawn, the log-probabilities of the
    work's targets and the most probable tokens there, the logits [n, V] of all its tokens, in the
    tower's dtype, and the check of a draft."""

    hidden: Tensor
    drawn: Drawn | None = None
    logprobs: tuple[float, ...] = ()
    top_log_probs: tuple[TopLogProbs, ...] = ()
    logits: Tensor | None = None
    checked: Checked | None = None


def leading_equal(draft: Sequence[int], drawn: Sequence[int]) -> int:
    """How many tokens of a draft, from its first on, were drawn as well."""
    pairs = zip(draft, drawn, strict=False)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), len(draft))


def result_of(hidden: Tensor, drawn: Drawn | NumericalError) -> ContextResult | NumericalError:
    """The result of a row whose last hidden state is `hidden`, or the error of its draw."""
    return drawn if isinstance(drawn, NumericalError) else ContextResult(hidden, drawn)
