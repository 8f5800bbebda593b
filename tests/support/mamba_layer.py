"""A Mamba-2 layer for the tests of its Triton kernels: shapes, random numbers, truth in fp64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from twotower.kernels.rows import Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
# A GPU's exp and division are off by a few units in the last place.
SLACK = 5.0 if DEVICE.type == "cuda" else 1.0


@dataclass(frozen=True)
class Shape:
    """H, P, N, G and K of a layer."""

    heads: int
    width: int
    n: int
    groups: int
    taps: int = 4

    @property
    def inner(self) -> int:
        """Channels of the mixer, Di."""
        return self.heads * self.width

    @property
    def channels(self) -> int:
        """Channels of the convolution, Cd."""
        return self.inner + 2 * self.groups * self.n


TINY = Shape(heads=2, width=5, n=7, groups=1)
NEMOTRON = Shape(heads=64, width=64, n=128, groups=8)


def rows_of(lengths: Sequence[int], slots: Sequence[int]) -> Rows:
    """Rows that know their numbers on the device only."""
    pages = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    built = Rows.build(lengths, slots, [0] * len(slots), pages, 16)
    return Rows(built.cu_seqlens, built.slots, built.context_lens, pages, 16, built.max_seqlen)


def steps_of_all_sizes(*shape: int, seed: int = 0) -> Tensor:
    """Steps spread from 1e-4 to 50 by their logarithm."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.tensor([1e-4, 50.0], dtype=torch.float64).log()
    places = torch.rand(*shape, generator=generator, dtype=torch.float64)
    return torch.exp(low + places * (high - low))


def before_softplus(steps: Tensor) -> Tensor:
    """The inverse of softplus of `steps` fp64, as fp32."""
    return (steps + torch.log(-torch.expm1(-steps))).float()


def true_softplus(x: Tensor) -> Tensor:
    """In fp64, small results exact too."""
    wide = x.double()
    return wide.clamp_min(0.0) + torch.log1p(torch.exp(-wide.abs()))


def true_conv(history: Tensor, xbc: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """history [K-1, Cd], xbc [L, Cd], weight [Cd, K], bias [Cd] -> silu of the conv in fp64,
    rounded to xbc's dtype, [L, Cd] fp64."""
    inputs = torch.cat((history, xbc)).double()
    total = torch.stack([inputs[t : t + weight.shape[1]] for t in range(len(xbc))])
    out = torch.einsum("lkc,ck->lc", total, weight.double())
    if bias is not None:
        out = out + bias.double()
    return (out * torch.sigmoid(out)).to(xbc.dtype).double()


def recurrence(
    shape: Shape, state: Tensor, conv: Tensor, steps: Tensor, a_log: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """state [H, P, N], conv [L, Cd], steps [L, H], a_log [H], all fp64 -> after each token the
    state and h C [H, P]."""
    x, b, c = conv.split((shape.inner, *[shape.groups * shape.n] * 2), dim=-1)
    for t in range(len(conv)):
        keys, queries = (
            part[t].view(shape.groups, 1, shape.n).expand(-1, shape.heads // shape.groups, -1)
            for part in (b, c)
        )
        decay = torch.exp(-steps[t] * torch.exp(a_log))[:, None, None]
        added = (steps[t, :, None] * x[t].view(shape.heads, -1))[..., None]
        state = decay * state + added * keys.reshape(shape.heads, 1, -1)
        yield state, (state * queries.reshape(shape.heads, 1, -1)).sum(-1)


def fill_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty returns NaN from now on: what is read before it was written is seen."""
    allocate = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(NAN) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", filled)
