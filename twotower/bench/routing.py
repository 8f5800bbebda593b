"""Random weights spread tokens over more experts than real text does; this narrows the choice.

In real text the 16 tokens of a block choose 34 of the released model's 128 experts a layer, where
independent choices give 69. An expert that is barred by the router's choice bias is never chosen;
how many stay open is searched for until a pass reads as many experts as wanted.
"""

from __future__ import annotations

import math

import torch

from twotower.bench.filled import FilledPool
from twotower.bench.probes import measured_unique
from twotower.planner.floors import expected_unique
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MoeWeights

# Scores lie between 0 and 1.
_BARRED = -4.0


def wanted_unique(config: TwoTowerConfig, single: float, rows: int) -> float:
    """Unique experts of `rows` rows, if one row alone reads `single` and rows choose
    independently."""
    experts, picks = config.n_routed_experts, config.num_experts_per_tok
    draws = math.log(1.0 - single / experts) / math.log(1.0 - picks / experts)
    return expected_unique(config, draws * rows)


def steer(tower: DenoiserTower, open_experts: int, seed: int = 0) -> None:
    """Leaves each layer a random choice of `open_experts` experts; all of them lifts the bar."""
    generator = torch.Generator().manual_seed(seed)
    for layer in tower.weights.layers:
        if isinstance(layer.mixer, MoeWeights):
            bias = layer.mixer.choice_bias
            ranks = torch.randperm(len(bias), generator=generator).to(bias.device)
            bias.copy_(torch.where(ranks < open_experts, 0.0, _BARRED))


def steer_to(
    tower: DenoiserTower, pool: FilledPool, rows: int, block: int, wanted: float
) -> tuple[int, float]:
    """Finds the fewest open experts with which a denoiser pass over `rows` rows reads `wanted`
    experts a layer, or as near as all allow; returns them and what it reads with them."""
    low, high = tower.config.num_experts_per_tok, tower.config.n_routed_experts
    while low < high:
        middle = (low + high) // 2
        steer(tower, middle)
        if measured_unique("denoise", tower, pool, rows, block) >= wanted:
            high = middle
        else:
            low = middle + 1
    steer(tower, low)
    return low, measured_unique("denoise", tower, pool, rows, block)
