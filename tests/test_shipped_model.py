"""The model in the package: small enough, whole, and worth a demo."""

from __future__ import annotations

import json

import pytest

from twotower import TwoTower
from twotower.towers.checkpoint.weights import SHIPPED_MODEL
from twotower.towers.config.model_config import LAYER_KINDS, MLP
from twotower.towers.training.tokenizer import tokenizer_config

LIBRARY_CODE = (
    "import os\nimport sys\n\n\ndef main(argv=None):\n    if argv is None:\n        argv = sys.argv"
)
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture(scope="module")
def model() -> TwoTower:
    return TwoTower.from_pretrained()


def test_it_fits_the_package_and_has_a_card() -> None:
    assert sum((SHIPPED_MODEL / name).stat().st_size for name in FILES) <= 20_000_000
    assert "tokens per denoiser call" in (SHIPPED_MODEL / "README.md").read_text()


def test_its_card_lists_every_phase_of_its_training() -> None:
    record = json.loads((SHIPPED_MODEL / "training.json").read_text(encoding="utf-8"))
    lines = (SHIPPED_MODEL / "README.md").read_text(encoding="utf-8").splitlines()
    runs = [record["start"]["phases"], record["phases"]]
    phases = [phase for run in runs for phase in run.items()]
    assert [name for name, _ in phases] == ["context", "denoiser", "denoiser"]
    for name, phase in phases:
        shown = f" | {phase['steps']} | {phase['tokens'] / 1e6:.1f} M | "
        assert any(line.startswith(f"| {name}") and shown in line for line in lines), name


def test_transformers_is_told_of_its_special_tokens(model: TwoTower) -> None:
    told = json.loads((SHIPPED_MODEL / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert told == tokenizer_config(model.config.max_position_embeddings)


def test_it_has_every_released_kind_of_layer(model: TwoTower) -> None:
    assert set(model.config.layer_pattern) == LAYER_KINDS - {MLP}


def test_it_has_learnt_library_code(model: TwoTower) -> None:
    scores = model.score(model.encode(LIBRARY_CODE))
    # Guessing over the vocabulary gives -7.6; a 3-gram of the corpus about -3.6.
    assert sum(scores) / len(scores) > -2.5


def test_the_threshold_trades_calls_for_certainty(model: TwoTower) -> None:
    calls = {
        threshold: model.generate([LIBRARY_CODE], confidence_threshold=threshold)[0].nfe
        for threshold in (0.0, 0.5, 0.8, 1.0)
    }
    assert calls[0.0] == 4
    assert calls[0.0] < calls[0.5] <= calls[0.8] < calls[1.0]
    # The first of each block's 16 tokens is the context tower's.
    assert calls[1.0] == 60


def test_text_continues_the_prompt(model: TwoTower) -> None:
    assert model.tokenizer is not None
    result = model.generate([LIBRARY_CODE], mode="ar", max_tokens=32)[0]
    whole = model.tokenizer.decode([*model.encode(LIBRARY_CODE), *result.token_ids])
    assert whole == LIBRARY_CODE + result.text
    assert len(result.text) > 32
