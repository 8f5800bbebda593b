"""Loading by several threads: their operators run alone, and what is loaded is the same."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.support.comparing import assert_same_bits
from tests.support.random_model import SMALL, random_tensors, write_checkpoint
from twotower.kernels import products
from twotower.towers.checkpoint import side_by_side
from twotower.towers.checkpoint.side_by_side import threads_side_by_side
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.errors import CheckpointError
from twotower.towers.model.context_tower import ContextTower


@pytest.fixture
def three_threads() -> Iterator[None]:
    """torch takes three threads, as on a machine with as many cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def in_a_new_thread() -> int:
    """torch's number of threads in a thread that begins now."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.usefixtures("three_threads")
def test_each_thread_computes_alone_and_others_keep_their_threads() -> None:
    together = threading.Barrier(3, timeout=10)

    def alone() -> int:
        together.wait()
        return torch.get_num_threads()

    with threads_side_by_side() as threads:
        running = [threads.submit(alone) for _ in range(3)]
        assert [each.result() for each in running] == [1, 1, 1]
        assert (torch.get_num_threads(), in_a_new_thread()) == (3, 3)
    assert (torch.get_num_threads(), in_a_new_thread()) == (3, 3)


@pytest.mark.usefixtures("three_threads")
def test_no_more_threads_than_are_of_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(side_by_side, "_MOST_THREADS", 2)
    with threads_side_by_side():
        assert sum(each.name.startswith("load_") for each in threading.enumerate()) == 2
        assert torch.get_num_threads() == 3
    assert not [each for each in threading.enumerate() if each.name.startswith("load_")]


def test_work_that_has_not_begun_is_dropped_after_an_error() -> None:
    begun, left = threading.Event(), threading.Event()
    waiting: list[Future[None]] = []

    def hold() -> None:
        begun.set()
        left.wait(10)

    def fail() -> None:
        with threads_side_by_side() as threads:
            threads.submit(hold)
            assert begun.wait(10)
            waiting.append(threads.submit(left.set))
            threading.Timer(0.05, left.set).start()
            raise CheckpointError("wrong")

    assert torch.get_num_threads() == 1
    with pytest.raises(CheckpointError, match="wrong"):
        fail()
    assert waiting[0].cancelled()


def logits(tower: ContextTower) -> torch.Tensor:
    return tower.forward([list(range(8))], [tower.new_state(16)])[0]


@pytest.mark.usefixtures("three_threads")
def test_more_threads_load_the_same_bits(folder: Path) -> None:
    many = load_context_tower(folder)
    torch.set_num_threads(1)
    one = load_context_tower(folder)
    assert_same_bits(logits(many), logits(one))
    assert [layer.kind for layer in many.weights.layers] == list(SMALL.layer_pattern)


@pytest.mark.usefixtures("three_threads")
def test_models_that_load_at_the_same_time(folder: Path) -> None:
    together = threading.Barrier(3, timeout=10)

    def load() -> ContextTower:
        together.wait()
        return load_context_tower(folder)

    with ThreadPoolExecutor(3) as pool:
        towers = [each.result() for each in [pool.submit(load) for _ in range(3)]]
    want = logits(load_context_tower(folder))
    for tower in towers:
        assert_same_bits(logits(tower), want)
    assert (torch.get_num_threads(), in_a_new_thread()) == (3, 3)


@pytest.mark.usefixtures("three_threads")
def test_of_several_wrong_tensors_the_first_is_named(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    wrong = ("layers.3.mixer.up_proj.weight", "layers.1.norm.weight", "layers.2.norm.weight")
    for name in wrong:
        tensors[f"denoiser_tower.{name}"].view(-1)[-1] = torch.nan
    write_checkpoint(tmp_path, tensors=tensors)
    for _ in range(5):
        with pytest.raises(CheckpointError, match=r"^denoiser_tower.layers.1.norm.weight: "):
            load_denoiser_tower(tmp_path)


@pytest.mark.skipif(products.best_products() == "plain", reason="nothing is packed here")
@pytest.mark.usefixtures("three_threads")
def test_single_rows_are_tried_at_load_and_not_in_the_first_step(folder: Path) -> None:
    with products.force_products(products.best_products()):
        products._shape_sums_alone.cache_clear()
        tower = load_context_tower(folder)
        tried = products._shape_sums_alone.cache_info().misses
        tower.forward([[1]], [tower.new_state(16)])
        assert products._shape_sums_alone.cache_info().misses == tried > 0


@pytest.mark.parametrize("kind", ["plain", products.best_products()])
def test_no_weight_lies_in_the_file(tmp_path: Path, kind: products.Products) -> None:
    """A file that is written over later does not change what was loaded."""
    path = write_checkpoint(tmp_path) / "model.safetensors"
    with products.force_products(kind):
        tower = load_context_tower(tmp_path)
        want = logits(tower)
        with path.open("r+b") as file:
            file.seek(1 << 14)
            file.write(b"\x7f" * (path.stat().st_size - (1 << 14)))
        assert_same_bits(logits(tower), want)
