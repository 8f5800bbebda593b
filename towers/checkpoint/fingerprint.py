"""A short name for a checkpoint's content, which tells one model from another.

It is made of the small files in full and of samples of the large ones, so that 126 GB take a
moment: two checkpoints that differ in a few numbers between the samples have the same one.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_WHOLE_BYTES = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10
_READ_AS = (".safetensors", ".json", ".jinja", ".model")


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits of a checkpoint's weights, config, tokenizer and chat template."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.iterdir()):
        if path.suffix in _READ_AS and path.is_file():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            _add(digest, path, size)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, path: Path, size: int) -> None:
    """Adds a file's bytes: all of them, or samples at even distances, its ends among them."""
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            while piece := file.read(1 << 20):
                digest.update(piece)
            return
        for index in range(_SAMPLES):
            file.seek(index * (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
