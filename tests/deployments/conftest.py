"""A tiny checkpoint that can read and write text, and a clock that stands still."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401

TINY = Path(__file__).parents[1] / "golden" / "tiny_a"


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock of the test's own."""
    return Clock()


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded tiny checkpoint with a byte-level tokenizer beside it."""
    folder = tmp_path_factory.mktemp("tiny_text")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder / name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "<bos>", "<eos>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
