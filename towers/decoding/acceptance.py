"""Relaxed acceptance of a denoiser's draft: how far it agrees with a mix of both towers.

At absolute position p let A(v) be the denoiser's draw score of token v and C(v) the context
tower's: log-probability after bias, penalties, temperature and filters (at temperature 0
log_softmax of the logits with bias and penalties), plus the same Gumbel noise, which is keyed by
the row, position p, step 0 and the domain of autoregressive draws (none at temperature 0). The
draft's token d is argmax A, the context tower's own is argmax C.

    target(v) = R A(v) + (1 - R) C(v)        R = GenerationParams.mix

d is accepted if everything before it was and target(d) = max target, ties being d's. At the first
rejection the context tower's own token argmax C is committed, as in strict acceptance. R = 0 is
strict acceptance (up to ties, and decided without these sums), R = 1 accepts every draft. As the
noise is the same, target is the score of a draw from the distribution p_A^R p_C^(1 - R).

Of A only the K = 64 largest of each position are known; every other token's is taken to be the
smallest of these K, which is never below the true one and so makes acceptance no easier. A token
that either tower has filtered out has A or C = -inf and is not accepted for 0 < R < 1.
Source of the rule: Israel et al. 2025 (adaptive parallel decoding), whose target it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from torch import Tensor

from twotower.kernels.unmask import without
from twotower.towers.decoding.sampling import Draw, Drawn, KeyedScores, sampling_batch
from twotower.towers.decoding.services import DraftScores
from twotower.towers.errors import NumericalError

# Scores of a position that travel between the towers: 12 KB for a draft of 16 tokens.
NUM_SCORES = 64


@dataclass(frozen=True)
class MixedDraft:
    """Drafted tokens [n], the scores that they were drawn from and the denoiser's share `mix`,
    above 0 and up to 1, where scores are not needed. Raises ValueError if scores are of another
    number of tokens, or lack below 1."""

    token_ids: Sequence[int]
    scores: DraftScores | None
    mix: float

    def __post_init__(self) -> None:
        if self.scores is None:
            if self.mix < 1:
                raise ValueError(f"draft scores: got none, expected some at a mix of {self.mix}")
            return
        shapes = tuple(self.scores.token_ids.shape), tuple(self.scores.scores.shape)
        count = len(self.token_ids)
        if shapes[0] != shapes[1] or shapes[0][:1] != (count,):
            raise ValueError(f"draft scores: got shapes {shapes}, expected {count} lines in both")


@dataclass(frozen=True)
class Checked:
    """What the context tower says to a draft of n tokens.

    `accepted[i]` tells whether token i passes, if all before it do. `drafted` are the n tokens with
    the context tower's probabilities, `own` the n + 1 tokens that it draws itself at their
    positions and after the last.
    """

    accepted: list[bool]
    drafted: Drawn
    own: Drawn

    @property
    def num_accepted(self) -> int:
        """Tokens before the first that is rejected."""
        return len(list(takewhile(bool, self.accepted)))


def check_draft(logits: Tensor, draw: Draw, draft: MixedDraft) -> Checked | NumericalError:
    """The context tower's logits [n + 1, V] at the positions of a draft and after its end, and its
    own draw there -> the check of the n tokens, or the error of non-finite logits."""
    keyed, count = KeyedScores.of(logits, draw), len(draft.token_ids)
    own = keyed.draw(logits, draw)
    if isinstance(own, NumericalError):
        return own
    tokens = torch.tensor(draft.token_ids, dtype=torch.int64, device=logits.device)
    wide = without(logits.float(), sampling_batch([draw], logits.device).excluded)[:count]
    log_probs = wide.gather(1, tokens.unsqueeze(1)).squeeze(1) - torch.logsumexp(wide, dim=-1)
    confidences = torch.exp(log_probs)
    drafted = Drawn(
        list(draft.token_ids),
        confidences.tolist(),
        log_probs.tolist(),
        own.top_log_probs[:count],
    )
    return Checked(_accepts(keyed.scores[:count], tokens, draft), drafted, own)


def _accepts(own: Tensor, tokens: Tensor, draft: MixedDraft) -> list[bool]:
    """The context tower's scores [n, V] of a draft with `tokens` [n] -> which of them the mix
    draws too."""
    if draft.mix >= 1:
        return [True] * len(tokens)
    assert draft.scores is not None
    best, ids = draft.scores.scores.to(own.device), draft.scores.token_ids.to(own.device)
    theirs = best[:, -1:].expand_as(own).scatter(1, ids, best)
    target = draft.mix * theirs + (1 - draft.mix) * own
    # A share so small that fp32 rounds it to 0 would make NaN of -inf.
    out = torch.isneginf(theirs) | torch.isneginf(own)
    target = target.masked_fill(out, float("-inf"))
    drafted = target.gather(1, tokens.unsqueeze(1)).squeeze(1)
    accepted: list[bool] = ((drafted == target.amax(-1)) & ~torch.isneginf(drafted)).tolist()
    return accepted


@dataclass
class ScoreLines:
    """Collects the scores of a draft's positions over its steps: a token keeps those of the step
    at which it was committed."""

    _lines: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def keep(self, masked: Sequence[int], committed: Sequence[int], scores: DraftScores) -> None:
        """Takes those of the positions that a step committed; the scores are of all `masked`."""
        places = {position: line for line, position in enumerate(masked)}
        for position in committed:
            line = places[position]
            self._lines[position] = scores.token_ids[line], scores.scores[line]

    def whole(self) -> DraftScores | None:
        """Those of all positions in their order, None if there are none."""
        if not self._lines:
            return None
        ids, scores = zip(*(self._lines[position] for position in sorted(self._lines)), strict=True)
        return DraftScores(torch.stack(ids), torch.stack(scores))
