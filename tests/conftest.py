"""What all tests share: one thread, the recorded checkpoints and models made from them.

`--products=plain` (or `onednn_fp32`) runs tests without real processes as on a
processor that has no better products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

# Before what reads the environment is imported.
import tests.support.environment  # noqa: F401
from tests.support.products import ALL_PRODUCTS, multiplied_by
from twotower import TwoTower
from twotower.kernels.products import Products, best_products
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
Engines = tuple[ContextEngine, DenoiserEngine]
NAMES = ("tiny_a", "tiny_b")

# Tiny matrices and a machine with other work on it: more threads only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--products", choices=ALL_PRODUCTS, help="multiply as other processors do")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only tests with real processes are asked for, files without any are not imported:
    there are hundreds, and all of their 8,700 tests would be collected to be left out."""
    if "cluster" not in config.option.markexpr.split(" and ") or collection_path.is_dir():
        return None
    is_test = collection_path.match("test_*.py")
    return True if is_test and "mark.cluster" not in collection_path.read_text("utf-8") else None


@pytest.fixture(scope="session", autouse=True)
def products_asked_for(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `--products` says, or what there is."""
    asked = request.config.getoption("--products")
    with multiplied_by(asked) if asked else nullcontext():
        yield


@pytest.fixture(scope="module", params=ALL_PRODUCTS)
def each_products(request: pytest.FixtureRequest) -> Iterator[Products]:
    """Each kind of products that this processor has, in turn."""
    if ALL_PRODUCTS.index(request.param) < ALL_PRODUCTS.index(best_products()):
        pytest.skip(f"this processor has {best_products()}")
    with multiplied_by(request.param):
        yield request.param


@pytest.fixture(scope="session", params=NAMES)
def folder(request: pytest.FixtureRequest) -> Path:
    """The folder of each recorded checkpoint in turn."""
    return GOLDEN / str(request.param)


@pytest.fixture(scope="session")
def context_tower(folder: Path) -> ContextTower:
    return load_context_tower(folder)


@pytest.fixture(scope="session")
def denoiser_tower(folder: Path) -> DenoiserTower:
    return load_denoiser_tower(folder)


@pytest.fixture(scope="session")
def engines(folder: Path) -> Engines:
    """Both engines of each recorded checkpoint, on this processor."""
    cpu = torch.device("cpu")
    return load_engines(folder, cpu, cpu, torch.float32)


@pytest.fixture(scope="session")
def model(folder: Path, engines: Engines) -> TwoTower:
    """The model that runs on `engines`."""
    return TwoTower(*engines, load_tokenizer(folder))


@pytest.fixture(scope="session")
def tiny_a() -> Path:
    return GOLDEN / "tiny_a"


@pytest.fixture(scope="session")
def tiny_b() -> Path:
    return GOLDEN / "tiny_b"
