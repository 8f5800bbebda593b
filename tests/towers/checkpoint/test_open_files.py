"""Files stay open while a thread reads them, and no longer than a limit of mapped bytes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from tests.support.comparing import assert_same_bits
from twotower.towers.checkpoint import open_files
from twotower.towers.checkpoint.open_files import OpenFiles
from twotower.towers.errors import CheckpointError

TENSORS = {name: torch.full((64,), float(index)) for index, name in enumerate("abcd")}
BYTES = 64 * 4


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    """Two files with the same tensors."""
    both = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for path in both:
        save_file(TENSORS, path)
    return both


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are opened from now on, in order."""
    seen: list[Path] = []

    def opening(path: Path, framework: str) -> Any:
        seen.append(path)
        return safetensors.safe_open(path, framework=framework)

    monkeypatch.setattr(open_files, "safe_open", opening)
    return seen


def test_a_file_is_opened_once_for_all_of_its_tensors(
    paths: list[Path], opened: list[Path]
) -> None:
    files = OpenFiles()
    for name, want in TENSORS.items():
        assert_same_bits(files.tensor(paths[0], name), want)
    assert opened == paths[:1]
    files.tensor(paths[1], "a")
    files.tensor(paths[1], "b")
    assert opened == paths


def test_a_file_is_opened_anew_when_much_of_it_is_mapped(
    paths: list[Path], opened: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_files, "_MOST_MAPPED", 2 * BYTES)
    files = OpenFiles()
    read = [files.tensor(paths[0], name) for name in TENSORS]
    assert opened == [paths[0]] * 2
    # What was read before is still there.
    for got, want in zip(read, TENSORS.values(), strict=True):
        assert_same_bits(got, want)


def test_each_thread_has_a_file_of_its_own(paths: list[Path], opened: list[Path]) -> None:
    files = OpenFiles()
    files.tensor(paths[0], "a")
    other = threading.Thread(target=files.tensor, args=(paths[0], "b"))
    other.start()
    other.join()
    files.tensor(paths[0], "c")
    assert opened == [paths[0]] * 2


def test_a_file_that_is_gone_or_lacks_a_tensor_is_named(paths: list[Path]) -> None:
    files = OpenFiles()
    files.tensor(paths[0], "a")
    with pytest.raises(CheckpointError, match=r"^one.safetensors: unreadable.*absent"):
        files.tensor(paths[0], "absent")
    paths[1].unlink()
    with pytest.raises(CheckpointError, match=r"^two.safetensors: missing"):
        files.tensor(paths[1], "a")
    assert_same_bits(files.tensor(paths[0], "b"), TENSORS["b"])
