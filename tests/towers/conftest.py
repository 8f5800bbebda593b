"""What tests of rows in real engines share: small towers with every kind of layer."""

from __future__ import annotations

import pytest

from tests.support.random_model import small_config, write_checkpoint
from tests.support.rows import Pair, Towers
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    """Towers with 24 tokens and every kind of layer."""
    config = small_config(layer_pattern="M*E-M*")
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), config)
    return load_context_tower(folder), load_denoiser_tower(folder)


@pytest.fixture
def pair(towers: Towers) -> Pair:
    return Pair.of(*towers)
