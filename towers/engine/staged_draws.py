"""Draws inside a graph of the context tower: their inputs on the way in, tokens on the way out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels.unmask import SamplingBatch
from twotower.towers.decoding.sampling import Draw, Drawn, signed
from twotower.towers.engine.cuda_graph import Staging
from twotower.towers.errors import NumericalError

DRAW_INPUTS = ("key", "position", "step", "domain", "excluded", "barred", "temperature")
DRAW_PADDING = {"excluded": -1, "barred": -1}


def draw_inputs(draws: Sequence[Draw]) -> dict[str, list[int]]:
    """The inputs DRAW_INPUTS of every position that is drawn, in order; for plain draws."""

    def spread(values: Sequence[int]) -> list[int]:
        return [v for v, draw in zip(values, draws, strict=True) for _ in draw.positions]

    return {
        "key": spread([signed(draw.sampler.key) for draw in draws]),
        "position": [position for draw in draws for position in draw.positions],
        "step": spread([draw.step for draw in draws]),
        "domain": spread([draw.domain for draw in draws]),
        # Draws of the context tower exclude nothing.
        "excluded": [-1 for draw in draws for _ in draw.positions],
        "barred": [token for draw in draws for token in draw.barred_tokens()],
        "temperature": spread(_as_bits([draw.sampler.temperature for draw in draws])),
    }


def staged_sampling(staging: Staging) -> SamplingBatch:
    """The same inputs on the device, for all lines of the staging."""
    given = {name: staging[name] for name in DRAW_INPUTS}
    return SamplingBatch(**{**given, "temperature": _from_bits(given["temperature"])})


def drawn_of(lines: Sequence[Sequence[float]], span: slice, draw: Draw) -> Drawn | NumericalError:
    """The tokens of a draw: its `span` of the lines id, confidence, log-probability and whether all
    logits were finite."""
    tokens, confidences, log_probs, finite = (list(line[span]) for line in lines)
    if not all(finite):
        return NumericalError(f"non-finite logits at position {draw.positions[0]}")
    return Drawn([int(token) for token in tokens], confidences, log_probs)


def _as_bits(values: Sequence[float]) -> list[int]:
    """Bit patterns of fp32 values, to be sent among whole numbers without rounding."""
    bits: list[int] = torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()
    return bits


def _from_bits(bits: Tensor) -> Tensor:
    """fp32 values of the bit patterns int64 [n]."""
    return bits.to(torch.int32).view(torch.float32)
