from __future__ import annotations

import os
from pathlib import Path

import pytest

from twotower.towers.checkpoint import fingerprint as module
from twotower.towers.checkpoint.fingerprint import fingerprint


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)


def test_content_counts_and_nothing_else(tmp_path: Path) -> None:
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(folder, "config.json", b"{}")
        write(folder, "model.safetensors", bytes(1000))
    write(second, "README.md", b"other words")
    os.utime(second / "config.json", (1, 1))
    assert fingerprint(first) == fingerprint(second)
    write(second, "config.json", b"[]")
    assert fingerprint(first) != fingerprint(second)


@pytest.mark.parametrize("place", [0, 5000, 99_999])
def test_a_large_file_is_known_by_its_ends_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: int
) -> None:
    monkeypatch.setattr(module, "_WHOLE_BYTES", 1000)
    monkeypatch.setattr(module, "_SAMPLE_BYTES", 2000)
    content = bytearray(100_000)
    write(tmp_path, "model.safetensors", content)
    before = fingerprint(tmp_path)
    content[place] = 1
    write(tmp_path, "model.safetensors", content)
    assert fingerprint(tmp_path) != before


def test_names_and_sizes_count(tmp_path: Path) -> None:
    write(tmp_path, "model.safetensors", b"ab")
    before = fingerprint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert fingerprint(tmp_path) != before
