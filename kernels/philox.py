"""Counter-based random numbers: Philox4x32-10.

A number is a pure function of a 64-bit key and a 128-bit counter, so a draw does not depend on
what was drawn before it, on which device, or next to which other row.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_LOW = 0xFFFFFFFF


def philox4x32(key: int | Tensor, counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
    """Four int64 tensors of 32-bit counter words, broadcast together -> their shape plus a last
    dimension of four random words, int64 in [0, 2^32). `key` is a number, or an int64 tensor that
    broadcasts with the counters."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(_ROUNDS):
        # int64 products wrap to the right 64 bits; the mask drops the sign that the shift drags.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (second >> 32 & _LOW) ^ c1 ^ k0,
            second & _LOW,
            (first >> 32 & _LOW) ^ c3 ^ k1,
            first & _LOW,
        )
        k0, k1 = k0 + _WEYL[0] & _LOW, k1 + _WEYL[1] & _LOW
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniforms(
    key: int | Tensor, positions: Tensor, step: int | Tensor, domain: int | Tensor, vocab_size: int
) -> Tensor:
    """positions [M] int64 -> U [M, vocab_size] fp32 in (0, 1); key, step and domain are numbers or
    [M] int64.

    The counter is (position, step, vocabulary index / 4, domain). U = (n + 1/2) / 2^23 from the
    upper 23 bits of a word: with 24 bits the largest value would round to 1 in fp32.
    """
    quads = torch.arange(-(-vocab_size // 4), device=positions.device)
    counter = (
        positions.view(-1, 1),
        _column(step, positions.device),
        quads.view(1, -1),
        _column(domain, positions.device),
    )
    key_column = key.view(-1, 1) if isinstance(key, Tensor) else key
    words = philox4x32(key_column, counter).flatten(1)[:, :vocab_size]
    return ((words >> 9).float() + 0.5) * 2.0**-23


def _column(value: int | Tensor, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value.view(-1, 1)
    return torch.tensor(value, device=device)
