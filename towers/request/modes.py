"""The decoding modes, and in which ways they differ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["mask_diffusion", "ar", "mock_ar", "verified"]
FinishReason = Literal["stop", "length"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class ModeTraits:
    """One mode.

    `needs_denoiser`: the denoiser tower draws its tokens or drafts. `by_block`: a draw fills a
    block of `block_size` positions, otherwise one position. `drafts`: what the denoiser draws is a
    draft that the context tower checks. `holds_last_token`: the context tower reads all tokens but
    the last, which the denoiser reads instead.
    """

    needs_denoiser: bool
    by_block: bool
    drafts: bool
    holds_last_token: bool

    @property
    def commits_blocks(self) -> bool:
        """True if only whole blocks are committed, so that a row resumes at a block's end."""
        return self.by_block and not self.drafts

    @property
    def extends(self) -> bool:
        """True if committed tokens reach the context tower by `extend`: it has not drawn or checked
        them itself."""
        return self.needs_denoiser and not self.drafts


_TRAITS: dict[Mode, ModeTraits] = {
    #                            needs_denoiser, by_block, drafts, holds_last_token
    "mask_diffusion": ModeTraits(True, True, False, False),
    "ar": ModeTraits(False, False, False, False),
    "mock_ar": ModeTraits(True, False, False, True),
    "verified": ModeTraits(True, True, True, False),
}


def traits_of(mode: Mode) -> ModeTraits:
    """The traits of a mode, one of MODES."""
    return _TRAITS[mode]
