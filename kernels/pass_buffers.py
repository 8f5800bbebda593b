"""What a pass over fixed buffers makes of the numbers that were sent, and puts where it is fetched.

A few numbers a row, for which torch needs several small operators each; on a GPU each of these is
one launch. `unpack_rows` begins a pass, `pack_drawn` ends it, and `right_counts` says how far
drafts were right in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack_rows(
    sent: Tensor, context: Tensor, slots: Tensor, context_lens: Tensor, length: int
) -> Tensor:
    """Sent slots and context lengths [>= B] int64 -> `slots` and `context_lens` [B] int32, written
    in place, and which tokens are not padding, [B * length] bool."""
    slots.copy_(sent[: len(slots)])
    context_lens.copy_(context[: len(slots)])
    return (slots >= 0).repeat_interleave(length)


def pack_drawn(drawn: Sequence[Tensor], out: Tensor) -> None:
    """Writes token ids [n] int64, confidences and log-probabilities [n] fp32 and finite [n] bool to
    the lines of `out` [4, n] fp64."""
    out.copy_(torch.stack([part.double() for part in drawn]))


def right_counts(drawn: Tensor, tokens: Tensor, starts: Tensor, slots: Tensor) -> Tensor:
    """How many of each row's tokens are right, [B] int32, if `drawn` [T] int64 are those that the
    tower has drawn after each of `tokens` [T]: a row's first, and those behind it up to the first
    that differs. Rows begin at `starts` [B + 1] int32; 0 where `slots` [B] int32 says padding."""
    total = len(drawn)
    places = torch.arange(total, device=drawn.device)
    last = (starts[1:].long() - 1).clamp(0, total - 1)
    ends = (drawn != tokens.roll(-1)).index_fill(0, last, True)
    # The first end from each place on, by the least of all behind it.
    first_ends = torch.where(ends, places, total - 1).flip(0).cummin(0).values.flip(0)
    begins = starts[:-1].long().clamp_max(total - 1)
    return torch.where(slots >= 0, first_ends[begins] - begins + 1, 0).int()
