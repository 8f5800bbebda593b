"""Safetensors files that stay open while their tensors are read, one for each thread that reads.

Opening a file reads its header, which names all of its tensors and takes as long as reading one or
two of them: opened for each tensor, a checkpoint of 1,464 tensors spent 1.8 of 3 seconds on that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.towers.errors import CheckpointError

# A file is opened anew after so many bytes: its mapped pages count as memory of the process.
_MOST_MAPPED = 128 << 20


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """An open safetensors file; raises CheckpointError if it is missing or unreadable."""
    with _named(path), safe_open(path, framework="pt") as file:
        yield file


class OpenFiles(threading.local):
    """The file that a thread reads, open until the thread reads another one or ends."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._file: safe_open | None = None
        self._mapped = 0

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor that is mapped from a file, by the name that it has there. Raises
        CheckpointError if the file is missing or unreadable."""
        with _named(path):
            if self._file is None or self._path != path or self._mapped >= _MOST_MAPPED:
                self._file = None
                self._file, self._path = safe_open(path, framework="pt"), path
                self._mapped = 0
            tensor: Tensor = self._file.get_tensor(name)
        self._mapped += tensor.nbytes
        return tensor


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of reading a file into CheckpointError with its name."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: missing from the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: unreadable or truncated ({error})") from None
