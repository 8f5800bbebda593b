"""Writes a safetensors file tensor by tensor, with only the current tensor in memory.

Layout: the header's size as 8 bytes, little endian; the header, JSON with each tensor's dtype,
shape and data offsets; the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors, section "Format".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from twotower.towers.checkpoint.checkpoint import FLOATING, FP8_NAME, Shape

_SIZES = FLOATING | {FP8_NAME: 1}
_ALIGNMENT = 8


@dataclass(frozen=True)
class StoredTensor:
    """Dtype (as safetensors names it, like BF16) and shape of a tensor in a file."""

    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        """The tensor's size in bytes."""
        return _SIZES[self.dtype] * torch.Size(self.shape).numel()


class TensorFile:
    """A new file for the tensors of `layout`, each to be written once, in any order."""

    def __init__(self, path: Path, layout: Mapping[str, StoredTensor]) -> None:
        # Wide dtypes first: then every tensor starts at a multiple of the width of its dtype.
        names = sorted(layout, key=lambda name: (-_SIZES[layout[name].dtype], name))
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        self._missing: dict[str, tuple[int, int]] = {}
        end = 0
        for name in names:
            start, end = end, end + layout[name].size
            self._missing[name] = (start, end)
            header[name] = {
                "dtype": layout[name].dtype,
                "shape": list(layout[name].shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode("utf-8")
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = _ALIGNMENT + len(text)
        self._file = path.open("xb")
        self._file.write(len(text).to_bytes(_ALIGNMENT, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Writes a tensor at its offset. Raises KeyError for a name that is not to be written
        (any more), ValueError if its bytes are not as many as in the layout."""
        start, end = self._missing.pop(name)
        content = tensor.contiguous().view(torch.uint8).numpy()
        if content.nbytes != end - start:
            raise ValueError(f"{name}: got {content.nbytes} bytes, expected {end - start}")
        self._file.seek(self._start + start)
        self._file.write(content.data)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._missing:
            raise ValueError(f"{min(self._missing)}: not written")
