"""Models as transformers' Auto classes give them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from twotower import TwoTower
from twotower.transformers import SHIPPED_MODEL


@pytest.fixture(scope="session")
def auto_model(folder: Path) -> Any:
    """Each recorded checkpoint in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def shipped() -> Any:
    return AutoModelForCausalLM.from_pretrained(SHIPPED_MODEL, dtype="float32")


@pytest.fixture(scope="session")
def shipped_alone() -> TwoTower:
    """The same model through this package's own API."""
    return TwoTower.from_pretrained()


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED_MODEL)
