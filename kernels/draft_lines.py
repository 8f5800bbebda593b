"""What a denoiser's step reads and writes of the drafts in their slots, beside the pass itself.

    read_blocks     the blocks' tokens and modulations, before the pass
    read_lines      the masked tokens' hidden states and how to draw them, before the head
    spread_lines    the predictions back to their places in the blocks, before the commit
    pack_drafts     the drafts after the step, for the host

Torch needs some forty small operators for these; on a GPU each is one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.commit import Drafts
from twotower.kernels.unmask import SamplingBatch

# The whole numbers of a draft's sampling, in this order.
WORDS = ("key", "start", "domain", "fixed_step", "eos", "eos_from")


@dataclass(frozen=True)
class DraftSampling:
    """How the drafts of S slots are drawn: `words` [S, len(WORDS)] int64, `temperature` [S] fp32,
    and the `mask` token, which is never drawn."""

    words: Tensor
    temperature: Tensor
    mask: int

    def word(self, name: str, slots: Tensor) -> Tensor:
        """A named word of the drafts in `slots`, shaped as `slots`."""
        return self.words[slots, WORDS.index(name)]


def read_blocks(drafts: Drafts, slots: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """slots [B] int32 -> tokens of their blocks, and how many positions of a token's block are
    masked, [B * length] int64 each; padding, slot -1, has the tokens of slot 0 and none masked."""
    real = slots.clamp_min(0).long()
    # Padding reads slot 0, whose block may be of any length: without the bound its entry could lie
    # behind this length's table. A failed row has -1.
    masked = torch.where(slots >= 0, drafts.remaining[real], 0).clamp(0, length)
    return drafts.tokens[real, :length].flatten(), masked.long().repeat_interleave(length)


def read_lines(
    hidden: Tensor,
    lines: Tensor,
    drafts: Drafts,
    slots: Tensor,
    sampling: DraftSampling,
    length: int,
) -> tuple[Tensor, SamplingBatch]:
    """hidden [B * length, H] and the tokens of `lines` [M] int32 -> their hidden states [M, H] and
    how to draw them. A line of -1 gets the last token's."""
    token = torch.where(lines >= 0, lines, len(hidden) - 1).long()
    own = slots.clamp_min(0).long()[token // length]
    position = sampling.word("start", own) + token % length
    step = torch.where(sampling.word("fixed_step", own) > 0, 0, drafts.step[own])
    early = position < sampling.word("eos_from", own)
    batch = SamplingBatch(
        sampling.temperature[own],
        sampling.word("key", own),
        position,
        step.long(),
        sampling.word("domain", own),
        torch.full_like(position, sampling.mask),
        torch.where(early, sampling.word("eos", own), -1),
    )
    return hidden[token], batch


def spread_lines(
    drawn: Sequence[Tensor], lines: Tensor, rows: int, length: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions of M lines -> token ids int64, confidences and log-probabilities fp32 and finite
    bool at the tokens of `lines` [M] int32, [rows, length] each. Without a line a token's have no
    meaning."""
    wanted = (lines >= 0).nonzero().squeeze(1)
    places = lines[wanted].long()
    placed = []
    for part in drawn:
        whole = part.new_zeros(rows * length)
        whole[places] = part[wanted]
        placed.append(whole.view(rows, length))
    ids, confidences, log_probs, finite = placed
    return ids, confidences, log_probs, finite


def pack_drafts(drafts: Drafts, slots: Tensor, out: Tensor) -> None:
    """The drafts in `slots` [B] int32 to `out` [B, 1 + 4 length] fp64: positions still masked, then
    tokens, commit steps, confidences and log-probabilities of the block."""
    length, real = out.shape[1] // 4, slots.clamp_min(0).long()
    parts = (drafts.tokens, drafts.commit_steps, drafts.confidences, drafts.log_probs)
    kept = [part[real, :length].double() for part in parts]
    out.copy_(torch.cat([drafts.remaining[real, None].double(), *kept], dim=1))
