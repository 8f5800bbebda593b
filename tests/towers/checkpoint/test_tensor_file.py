"""The safetensors library reads files that were written tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.comparing import assert_same_bits
from twotower.towers.checkpoint.tensor_file import StoredTensor, TensorFile

TENSORS = {
    "odd": torch.arange(7).float().to(torch.float8_e4m3fn).view(7, 1),
    "half": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).half(),
    "wide": torch.tensor([1.5, -2.25], dtype=torch.float64),
    "brain": torch.tensor([[0.1], [3e38]]).bfloat16(),
    "plain": torch.tensor([1e-42, 0.0, -0.0]),
}
NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
LAYOUT = {name: StoredTensor(NAMES[t.dtype], tuple(t.shape)) for name, t in TENSORS.items()}


def test_the_library_reads_every_dtype(tmp_path: Path) -> None:
    with TensorFile(tmp_path / "x.safetensors", LAYOUT) as file:
        for name in reversed(list(TENSORS)):
            file.write(name, TENSORS[name])
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert_same_bits(loaded[name].view(torch.uint8), tensor.view(torch.uint8), name)
    with safe_open(tmp_path / "x.safetensors", framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_a_transposed_tensor_is_written_in_its_own_order(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3).t()
    with TensorFile(tmp_path / "x", {"t": StoredTensor("F32", (3, 2))}) as file:
        file.write("t", tensor)
    assert_same_bits(load_file(tmp_path / "x")["t"], tensor)


def test_sizes_of_the_layout() -> None:
    sizes = {"odd": 7, "half": 30, "wide": 16, "brain": 4, "plain": 12}
    assert {name: stored.size for name, stored in LAYOUT.items()} == sizes


def test_a_wrong_size_and_a_forgotten_tensor_are_errors(tmp_path: Path) -> None:
    layout = {"t": StoredTensor("F32", (4,))}
    with (
        pytest.raises(ValueError, match="t: got 12 bytes, expected 16"),
        TensorFile(tmp_path / "x", layout) as file,
    ):
        file.write("t", torch.zeros(3))
    with (
        pytest.raises(ValueError, match="t: not written"),
        TensorFile(tmp_path / "y", layout),
    ):
        pass


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(FileExistsError):
        TensorFile(tmp_path / "x", LAYOUT)
    assert (tmp_path / "x").read_text() == "mine"
