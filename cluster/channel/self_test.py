"""The self-test of a link: known updates, which the receiver compares bit for bit.

Both sides derive every share from its name, its layer, the number of its update and each value's
place, so that nothing but the updates is sent. Parts that were swapped, cut off, moved or come from
another update differ. All values are finite numbers, whatever their dtype. The updates have the
shapes of the model and belong to no row.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import UnavailableError
from twotower.towers.state.update import StateUpdate, UpdatePlan

# No row has this name: it is longer than those that are drawn.
SELF_TEST_ROW = "the self-test of a link between towers"
# Every kind of update, of several lengths; few tokens, as the receiver bounds what a row may have.
SELF_TEST_PLANS = (
    UpdatePlan("snapshot", 0, 16),
    UpdatePlan("delta", 16, 21),
    UpdatePlan("kv", 21, 34),
    UpdatePlan("delta", 21, 22),
)
# For what takes a second where it works. A group may take this long to say that it does not form.
SELF_TEST_TIMEOUT_S = 120.0
_WORD = 0xFFFFFFFF
_PLACES, _MIXED = 0x9E3779B1, 0x85EBCA6B
# Of both widths the highest bit of the exponent: without it no number is infinite or NaN.
_WIDTHS = {4: (torch.int32, 0xBFFFFFFF, 0x80000000), 2: (torch.int16, 0xBFFF, 0x8000)}


class LinkTestError(UnavailableError):
    """A transport does not carry the states of a pair."""


def known_shares(
    config: TwoTowerConfig, number: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, int, Tensor]]:
    """Name, layer and share of all tensors of known update `number`, as a pass would put them."""
    for name, layout in SELF_TEST_PLANS[number].layout(config, dtype).items():
        for layer, share in enumerate(layout):
            shape = tuple(share.shape)
            yield name, layer, _known_share(name, layer, number, shape, layout.dtype, device)


def has_known_values(update: StateUpdate, number: int) -> bool:
    """True if an update is number `number` of the known ones, in every bit."""
    if not 0 <= number < len(SELF_TEST_PLANS) or update.plan != SELF_TEST_PLANS[number]:
        return False
    return all(_is_known(name, layer, number, share) for name, layer, share in update.parts())


def _is_known(name: str, layer: int, number: int, share: Tensor) -> bool:
    bits = _WIDTHS[share.element_size()][0]
    known = _known_share(name, layer, number, tuple(share.shape), share.dtype, share.device)
    return torch.equal(share.view(bits), known.view(bits))


def _known_share(
    name: str,
    layer: int,
    number: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    salt = zlib.crc32(f"{name}/{layer}/{number}".encode())
    word = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
    word = (word * _PLACES + salt) & _WORD
    word = ((word ^ (word >> 15)) * _MIXED) & _WORD
    bits, kept, sign = _WIDTHS[dtype.itemsize]
    word = (word ^ (word >> 13)) & kept
    return ((word ^ sign) - sign).to(bits).view(dtype).view(shape)
