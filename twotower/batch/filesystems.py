"""Paths and URLs as a filesystem of pyarrow and a path in it."""

from __future__ import annotations

import os

import fsspec
import fsspec.core
import pyarrow.fs
from fsspec.implementations.arrow import ArrowFSWrapper

from twotower.towers.errors import InvalidRequestError, cut_off


def open_filesystem(url: str, field: str = "path") -> tuple[pyarrow.fs.FileSystem, str]:
    """The filesystem of a local path or of a URL that pyarrow or fsspec knows, and the path in it.

    Raises InvalidRequestError, which names `field` and the URL, if neither can open it.
    """
    if "://" not in url:
        return pyarrow.fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    try:
        return _open(url)
    except (ValueError, OSError, ImportError) as error:
        reason = cut_off(str(error), 200)
        raise InvalidRequestError(field, url, f"a URL that can be opened ({reason})") from error


def _open(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(url)
    except (ValueError, NotImplementedError):
        # Not one of pyarrow's own, or a path with characters that it wants quoted.
        other, path = fsspec.core.url_to_fs(url)
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
    return filesystem, path


def fsspec_of(filesystem: pyarrow.fs.FileSystem) -> fsspec.AbstractFileSystem:
    """The same filesystem with fsspec's methods, of which `glob` is the one that pyarrow lacks."""
    handler = getattr(filesystem, "handler", None)
    if isinstance(handler, pyarrow.fs.FSSpecHandler):
        return handler.fs
    return ArrowFSWrapper(filesystem)


def join_path(folder: str, name: str) -> str:
    """The path of a file in a folder, on any filesystem."""
    return f"{folder.rstrip('/')}/{name}"
