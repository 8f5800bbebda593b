"""Resources and limits of a pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from twotower.cluster.topology import (
    CONTEXT_BUNDLE,
    DENOISER_BUNDLE,
    PairTopology,
    max_update_bytes,
)
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.engine.options import EngineOptions
from twotower.towers.state.update import UpdateBuilder, UpdatePlan

TINY = Path(__file__).parents[1] / "golden" / "tiny_a"
PAIR = PairTopology(
    model_path="m",
    device="cpu",
    dtype="float32",
    engine=EngineOptions(max_num_seqs=4, max_context=64, prefix_cache_mib=0),
    cpus_per_tower=0.4,
    gpus_per_tower=0.0,
    num_threads=1,
)


def test_towers_ask_for_cpu_shares_or_for_gpus() -> None:
    on_cpu = PAIR.bundles()
    assert on_cpu[CONTEXT_BUNDLE] == on_cpu[DENOISER_BUNDLE] == {"CPU": 0.4}
    assert "GPU" not in on_cpu[0]
    on_gpu = replace(PAIR, device="cuda", gpus_per_tower=1.0).bundles()
    assert on_gpu[CONTEXT_BUNDLE] == on_gpu[DENOISER_BUNDLE] == {"CPU": 0.4, "GPU": 1.0}


@pytest.mark.parametrize(
    "wrong",
    [
        {"device": "cuda"},
        {"transport": "nccl"},
        {"device": "cuda", "gpus_per_tower": 0.5, "transport": "nccl"},
        {"denoisers_per_context": 2, "placement": "colocated"},
    ],
)
def test_impossible_shapes_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"got .*expected"):
        replace(PAIR, **wrong)  # type: ignore[arg-type]


def test_a_full_row_fits_the_largest_update() -> None:
    config = TwoTowerConfig.from_file(TINY / "config.json")
    for plan in (UpdatePlan("snapshot", 0, 1024), UpdatePlan("kv", 0, 1024)):
        builder = UpdateBuilder(config, plan, torch.device("cpu"), torch.float32)
        num_bytes = sum(tensor.nbytes for tensor in builder.layout.values())
        assert num_bytes <= max_update_bytes(config, 1024)
