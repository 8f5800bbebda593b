"""Counts block scans from large random states that give a value which is not finite.

A tower of Mamba layers alone runs whole passes, so that the scan is the engines' scan. A non-finite
value anywhere in a scan stays in its row's residual stream to the end.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.random_towers import TowerMaker
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MambaWeights
from twotower.towers.state.context_state import ContextState

_PATTERN = "MMMM"
_CONTEXT = 64
# Standard deviations of SSM states: from those after a short prompt to those of long contexts.
STATE_SCALES = (1.0, 30.0, 1000.0)
# Time steps after softplus, over a layer's heads: from nearly 0 to one that forgets the state.
_SMALLEST_DT, _LARGEST_DT = 1e-4, 50.0


def scan_config(config: TwoTowerConfig) -> TwoTowerConfig:
    """The config of a narrow tower of nothing but Mamba layers of a model's shape."""
    return replace(config, layer_pattern=_PATTERN, hidden_size=256, vocab_size=256)


def count_bad_scans(
    config: TwoTowerConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scans: int,
    rows: int,
    block: int = 16,
    seed: int = 0,
) -> dict[str, Any]:
    """Runs at least `scans` block scans, `rows` rows a pass, each pass from fresh states.

    Returns the number of scans (a row's block in a layer), of rows whose pass gave a value that is
    not finite, and the largest state's standard deviation.
    """
    narrow = scan_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    tower = TowerMaker(narrow, device, dtype, generator).denoiser()
    _spread_time_steps(tower)
    pool = FilledPool(narrow, rows, pages_of_rows(rows, _CONTEXT + block), device, dtype)
    tokens = torch.Generator().manual_seed(seed)
    with pool.rows_at(_CONTEXT, rows, block) as states:
        done, bad = _run(tower, pool, states, scans, block, generator, tokens)
    return {"scans": done, "bad_rows": bad, "largest_state": STATE_SCALES[-1]}


def _run(
    tower: DenoiserTower,
    pool: FilledPool,
    states: list[ContextState],
    scans: int,
    block: int,
    generator: torch.Generator,
    tokens: torch.Generator,
) -> tuple[int, int]:
    """The number of scans done, and of rows with a value that is not finite."""
    rows, vocab = len(states), tower.config.vocab_size
    done = 0
    bad = torch.zeros((), dtype=torch.int64, device=tower.device)
    while done < scans:
        scale = STATE_SCALES[done // (rows * len(_PATTERN)) % len(STATE_SCALES)]
        # All slots at once: a row at a time would cost more than the scans.
        pool.ssm.normal_(0.0, scale, generator=generator)
        pool.conv.normal_(generator=generator)
        draft = torch.randint(4, vocab, (rows, block), generator=tokens).tolist()
        with torch.inference_mode():
            hidden = tower.forward(draft, [0.5] * rows, states)
            bad += (~torch.isfinite(hidden).all(-1).view(rows, block).all(-1)).sum()
        done += rows * len(_PATTERN)
    return done, int(bad)


def _spread_time_steps(tower: DenoiserTower) -> None:
    """Gives a layer's heads biases such that softplus(bias) covers the whole range."""
    for layer in tower.weights.layers:
        assert isinstance(layer.mixer, MambaWeights)
        bias = layer.mixer.dt_bias
        first, last = math.log10(_SMALLEST_DT), math.log10(_LARGEST_DT)
        steps = torch.logspace(first, last, len(bias), dtype=torch.float64)
        # The inverse of softplus.
        bias.copy_(torch.where(steps > 20.0, steps, torch.log(torch.expm1(steps))))
