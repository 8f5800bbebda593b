"""The four ways of decoding, and in what they differ: a line of one table each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["mask_diffusion", "ar", "mock_ar", "verified"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class ModeTraits:
    """Properties of a mode.

    `tokens_from` is the tower whose tokens are committed; those of the denoiser are read into the
    context by an extension. `unit` is what one commit holds: a token, a block of `block_size`
    tokens, or what is accepted of a draft of that length and the context tower's token after it. A
    row can be resumed after any of its tokens, but with unit "block" after whole blocks only.

    `holds_prompt_end`: the context ends before the last prompt token, which the denoiser reads.
    `holds_output_end`: it ends before the last committed token, which is the first of the next
    draft. `can_be_eased`: a request may give floors down to which it is served under load.
    """

    needs_denoiser: bool
    tokens_from: Literal["context", "denoiser"]
    unit: Literal["token", "block", "draft"]
    holds_prompt_end: bool = False
    holds_output_end: bool = False
    can_be_eased: bool = False


TRAITS: dict[Mode, ModeTraits] = {
    "mask_diffusion": ModeTraits(True, "denoiser", "block", can_be_eased=True),
    "ar": ModeTraits(False, "context", "token"),
    "mock_ar": ModeTraits(True, "denoiser", "token", holds_prompt_end=True),
    "verified": ModeTraits(True, "context", "draft", holds_output_end=True),
}


def served_modes(*, with_denoiser: bool) -> tuple[Mode, ...]:
    """Modes that a context tower serves alone, or together with a denoiser."""
    return tuple(mode for mode in MODES if with_denoiser or not TRAITS[mode].needs_denoiser)
