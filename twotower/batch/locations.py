"""A file or folder on any filesystem."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from twotower.towers.errors import ConfigError


@dataclass(frozen=True)
class Location:
    """A path on a filesystem; `name` is what users call it."""

    filesystem: fs.FileSystem
    path: str
    name: str

    @classmethod
    def of(cls, name: str) -> Location:
        """The place that a path or a URL names: a local one, or of any filesystem that pyarrow or
        fsspec knows. Raises ConfigError for a URL that neither takes."""
        if "://" not in name:
            return cls(fs.LocalFileSystem(), os.path.abspath(name), name)
        try:
            filesystem, path = fs.FileSystem.from_uri(name)
            return cls(filesystem, path, name)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ImportError, OSError):
            return cls._of_fsspec(name)

    @classmethod
    def _of_fsspec(cls, name: str) -> Location:
        import fsspec

        try:
            own, path = fsspec.core.url_to_fs(name)
        except (ValueError, ImportError, OSError) as error:
            raise ConfigError(f"{name}: no filesystem for it ({error})") from None
        return cls(fs.PyFileSystem(fs.FSSpecHandler(own)), path, name)

    def __truediv__(self, name: str) -> Location:
        return Location(
            self.filesystem, posixpath.join(self.path, name), posixpath.join(self.name, name)
        )

    def beside(self, suffix: str) -> Location:
        """The place whose name has `suffix` behind this one's."""
        return Location(self.filesystem, self.path + suffix, self.name + suffix)

    def exists(self) -> bool:
        """True if a file or folder is there."""
        kind: fs.FileType = self.filesystem.get_file_info(self.path).type
        return kind != fs.FileType.NotFound
