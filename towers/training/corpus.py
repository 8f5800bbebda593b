"""The training text: the Python files of the running interpreter's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from twotower.towers.training.tokenizer import BOS, EOS

# Character tables and generated help texts are not code; site-packages differ between machines.
EXCLUDED_FOLDERS = frozenset(("encodings", "pydoc_data", "site-packages", "__pycache__"))
MIN_CHARACTERS = 200
HELD_OUT_SHARE = 10

TokenArray = npt.NDArray[np.uint16]


@dataclass(frozen=True)
class SourceFile:
    """A file of the corpus: its path relative to the root (with `/`) and its text."""

    path: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.path)


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def is_held_out(relative_path: str) -> bool:
    """True if a file belongs to the fixed tenth that no training step reads."""
    digest = hashlib.sha256(relative_path.encode("utf-8")).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_SHARE == 0


def read_corpus(root: Path) -> list[SourceFile]:
    """The UTF-8 `.py` files under `root` with at least MIN_CHARACTERS, in order of their paths and
    without the excluded folders."""
    return [SourceFile(path, text) for path, text in _texts(root) if len(text) >= MIN_CHARACTERS]


def encode_files(tokenizer: Tokenizer, files: Iterable[SourceFile]) -> TokenArray:
    """All files as a single uint16 stream [tokens], each between a bos and an eos."""
    encoded = tokenizer.encode_batch([file.text for file in files], add_special_tokens=False)
    if not encoded:
        return np.zeros(0, dtype=np.uint16)
    pieces = [np.array([BOS, *encoding.ids, EOS], dtype=np.uint16) for encoding in encoded]
    return np.concatenate(pieces)


def _texts(root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts):
            try:
                yield relative.as_posix(), path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                # The tests of the library hold files in other encodings on purpose.
                continue
