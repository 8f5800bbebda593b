"""The ways of decoding, and in what they differ: a line of one table each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

Mode = Literal["mask_diffusion", "ar", "mock_ar", "verified", "auto"]
MODES: tuple[Mode, ...] = get_args(Mode)


@dataclass(frozen=True)
class ModeTraits:
    """Properties of a mode.

    `denoiser` tells whether rows are opened in a denoiser tower: `optional` is with one if the
    deployment has one and the request's parameters use it. `tokens_from` is the tower whose tokens
    are committed; those of the denoiser are read into the context by an extension. `unit` is what
    one commit holds: a token, a block of `block_size` tokens, or what is accepted of a draft of
    that length and the context tower's token after it. A row can be resumed after any of its
    tokens, but with unit "block" after whole blocks only.

    `holds_prompt_end`: the context ends before the last prompt token, which the denoiser reads.
    `holds_output_end`: it ends before the last committed token, which is the first of the next
    draft. `can_be_eased`: a request may give floors down to which it is served under load.
    `chooses`: how to draft and to check is up to the service, within the request's quality.
    """

    denoiser: Literal["never", "optional", "always"]
    tokens_from: Literal["context", "denoiser"]
    unit: Literal["token", "block", "draft"]
    holds_prompt_end: bool = False
    holds_output_end: bool = False
    can_be_eased: bool = False
    chooses: bool = False


TRAITS: dict[Mode, ModeTraits] = {
    "mask_diffusion": ModeTraits("always", "denoiser", "block", can_be_eased=True),
    "ar": ModeTraits("never", "context", "token"),
    "mock_ar": ModeTraits("always", "denoiser", "token", holds_prompt_end=True),
    "verified": ModeTraits("optional", "context", "draft", holds_output_end=True),
    "auto": ModeTraits("optional", "context", "draft", holds_output_end=True, chooses=True),
}


def served_modes(*, with_denoiser: bool) -> tuple[Mode, ...]:
    """Modes that a context tower serves alone, or together with a denoiser."""
    return tuple(mode for mode in MODES if with_denoiser or TRAITS[mode].denoiser != "always")
