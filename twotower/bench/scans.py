"""Block scans by the hundred thousand from large random states: none may give a NaN.

A tower of Mamba layers alone runs whole passes, so that the scan is the one that the engines use.
A non-finite value anywhere in a scan stays in its row's residual stream to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.random_towers import TowerMaker
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MambaWeights
from twotower.towers.state.context_state import ContextState

_PATTERN = "MMMM"
_CONTEXT = 64
# From a state as after a short prompt to the largest that long contexts leave.
STATE_SCALES = (1.0, 30.0, 1000.0)
# Time steps after softplus, over a layer's heads: from nearly none to one that forgets everything.
_SMALLEST_DT, _LARGEST_DT = 1e-4, 50.0


@dataclass(frozen=True)
class Scans:
    """How many scans of one row's block in one layer ran, and in how many rows' passes anything
    was not finite."""

    scans: int
    bad_rows: int
    largest_state: float


def scan_config(config: TwoTowerConfig) -> TwoTowerConfig:
    """Mamba layers of a model's shape in a narrow tower of nothing else."""
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
) -> Scans:
    """Runs at least `scans` block scans, `rows` rows a pass, each pass from fresh states."""
    narrow = scan_config(config)
    generator = torch.Generator(device).manual_seed(seed)
    tower = TowerMaker(narrow, device, dtype, generator).denoiser()
    _spread_time_steps(tower)
    pool = FilledPool(narrow, rows, pages_of_rows(rows, _CONTEXT + block), device, dtype)
    tokens = torch.Generator().manual_seed(seed)
    with pool.rows_at(_CONTEXT, rows, block) as states:
        done, bad = _run(tower, pool, states, scans, block, generator, tokens)
    return Scans(done, bad, STATE_SCALES[-1])


def _run(
    tower: DenoiserTower,
    pool: FilledPool,
    states: list[ContextState],
    scans: int,
    block: int,
    generator: torch.Generator,
    tokens: torch.Generator,
) -> tuple[int, int]:
    """Scans done and rows with anything not finite."""
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
