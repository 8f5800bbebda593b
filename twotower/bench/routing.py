"""Narrows the routing of random weights, which spread tokens over more experts than text does.

In real text the 16 tokens of a block choose 34 of the released model's 128 experts a layer, where
independent choices give 69. An expert whose choice bias in the router is far below the others is
never chosen; the number of open experts is searched for with which a pass reads as many as wanted.
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

# A choice bias that bars an expert: scores lie between 0 and 1.
_BARRED = -4.0


def wanted_unique(config: TwoTowerConfig, single: float, rows: int) -> float:
    """Experts per layer that `rows` rows read if a single row reads `single` and rows choose
    independently."""
    experts, picks = config.n_routed_experts, config.num_experts_per_tok
    draws = math.log(1.0 - single / experts) / math.log(1.0 - picks / experts)
    return expected_unique(config, draws * rows)


def steer(tower: DenoiserTower, open_experts: int) -> None:
    """Bars all but `open_experts` experts, drawn by a fixed seed, in each layer."""
    generator = torch.Generator().manual_seed(0)
    for layer in tower.weights.layers:
        if isinstance(layer.mixer, MoeWeights):
            bias = layer.mixer.choice_bias
            ranks = torch.randperm(len(bias), generator=generator).to(bias.device)
            bias.copy_(torch.where(ranks < open_experts, 0.0, _BARRED))


def steer_to(
    tower: DenoiserTower, pool: FilledPool, rows: int, block: int, wanted: float
) -> tuple[int, float]:
    """Steers to the fewest open experts with which a denoiser pass over `rows` rows reads at least
    `wanted` experts a layer; to all if even they give fewer. Returns the number of open experts and
    the mean number read per layer."""
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
