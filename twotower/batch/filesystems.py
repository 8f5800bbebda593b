"""Paths and URLs as a filesystem of pyarrow and a path in it."""

from __future__ import annotations

import pyarrow.fs


def open_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of a local path or of a URL that pyarrow or fsspec knows, and the path in it.

    Raises InvalidRequestError, which names the URL, if neither can open it.
    """
    raise NotImplementedError
