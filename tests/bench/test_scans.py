"""Block scans from large states."""

from __future__ import annotations

import pytest
import torch

from tests.bench.conftest import CPU
from twotower.bench import scans
from twotower.bench.random_towers import TowerMaker
from twotower.kernels.elementwise import softplus
from twotower.planner.shapes import LARGE, TINY


def test_none_of_some_hundred_is_bad() -> None:
    done = scans.count_bad_scans(TINY, CPU, torch.float32, scans=300, rows=8)
    # Whole passes of 8 rows and 4 layers.
    assert done == {"scans": 320, "bad_rows": 0, "largest_state": 1000.0}


def test_a_bad_row_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scans, "STATE_SCALES", (float("inf"),))
    done = scans.count_bad_scans(TINY, CPU, torch.float32, scans=32, rows=8)
    assert done["bad_rows"] == 8


def test_the_shape_is_that_of_the_model_s_scan() -> None:
    narrow = scans.scan_config(LARGE)
    for name in ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel"):
        assert getattr(narrow, name) == getattr(LARGE, name)
    assert set(narrow.layer_pattern) == {"M"}


def test_time_steps_cover_the_range() -> None:
    narrow = scans.scan_config(LARGE)
    tower = TowerMaker(narrow, CPU, torch.float32, torch.Generator().manual_seed(0)).denoiser()
    scans._spread_time_steps(tower)
    steps = softplus(tower.weights.layers[0].mixer.dt_bias)
    assert float(steps.min()) == pytest.approx(1e-4, rel=0.01)
    assert float(steps.max()) == pytest.approx(50.0, rel=0.01)
