"""How tokens are drawn inside a graph of the context tower: numbers on their way to the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels.unmask import SamplingBatch
from twotower.towers.decoding.sampling import Draw, signed
from twotower.towers.engine.cuda_graph import Staging

DRAW_INPUTS = ("key", "position", "step", "domain", "barred", "temperature")
DRAW_PADDING = {"barred": -1}


def draw_inputs(draws: Sequence[Draw]) -> dict[str, list[int]]:
    """Of every position that is drawn, in order, what `staged_sampling` reads; unfiltered draws."""

    def spread(values: Sequence[int]) -> list[int]:
        return [v for v, draw in zip(values, draws, strict=True) for _ in draw.positions]

    return {
        "key": spread([signed(draw.sampler.key) for draw in draws]),
        "position": [position for draw in draws for position in draw.positions],
        "step": spread([draw.step for draw in draws]),
        "domain": spread([draw.domain for draw in draws]),
        "barred": [token for draw in draws for token in draw.barred_tokens()],
        "temperature": spread(_as_bits([draw.sampler.temperature for draw in draws])),
    }


def staged_sampling(staging: Staging) -> SamplingBatch:
    """The same on the device, for as many lines as the staging has."""
    key = staging["key"]
    return SamplingBatch(
        _from_bits(staging["temperature"]),
        key,
        staging["position"],
        staging["step"],
        staging["domain"],
        torch.full_like(key, -1),
        staging["barred"],
    )


def _as_bits(values: Sequence[float]) -> list[int]:
    """fp32 values as whole numbers, in which they travel among others with every bit."""
    bits: list[int] = torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()
    return bits


def _from_bits(bits: Tensor) -> Tensor:
    """The opposite of `_as_bits`, of int64 [n]."""
    return bits.to(torch.int32).view(torch.float32)
