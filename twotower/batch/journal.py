"""Where a job keeps its files, and what it was begun with: the same command goes on, another is
refused."""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pyarrow import fs

from twotower.batch.filesystems import open_filesystem
from twotower.batch.inputs import kind_of
from twotower.batch.join import errors_path
from twotower.batch.parts import PartFolder
from twotower.batch.sink import Format
from twotower.towers.errors import ConfigError, InvalidRequestError, cut_off

_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_VERSION = 1
# In a folder of parts.
_JOB = "_job"
_SHOWN = 120


@dataclass(frozen=True)
class JobPlaces:
    """A job's output and the folders beside it, as paths or URLs.

    A file as output is joined at the end from parts in `OUTPUT.job/parts`; a folder as output holds
    the parts themselves. `file` is None for a folder.
    """

    format: Format
    file: str | None
    parts: str
    checkpoints: str
    journal: str

    @classmethod
    def of(cls, output: str, wanted: Format | None) -> JobPlaces:
        """The places for an output. Raises InvalidRequestError if it can be none, or if its suffix
        and the wanted format contradict each other."""
        _check_output(output)
        output = output.rstrip("/") if "://" in output else os.path.abspath(output)
        named = _FORMATS.get(posixpath.splitext(output)[1])
        if named is not None and wanted not in (None, named):
            raise InvalidRequestError("format", wanted, f"{named} for {posixpath.basename(output)}")
        job = f"{output}.job" if named is not None else f"{output}/{_JOB}"
        parts = f"{job}/parts" if named is not None else output
        file = output if named is not None else None
        return cls(named or wanted or "jsonl", file, parts, f"{job}/checkpoints", f"{job}/job.json")

    def owns(self, filesystem: fs.FileSystem, path: str) -> bool:
        """True for a file that is the job's output, or a part of it."""
        if self.file is not None:
            files = [open_filesystem(url) for url in (self.file, errors_path(self.file))]
            return any(own.equals(filesystem) and path == name for own, name in files)
        own, folder = open_filesystem(self.parts)
        return own.equals(filesystem) and path.startswith(f"{folder}/")

    def make(self) -> None:
        """Makes the folders."""
        for url in (self.parts, self.checkpoints):
            filesystem, path = open_filesystem(url)
            filesystem.create_dir(path, recursive=True)

    def clear(self) -> None:
        """Deletes what a job has left, its output too; nothing that no job has made."""
        if not _exists(self.journal):
            return
        parts = PartFolder(self.parts, self.checkpoints)
        # The journal last: what has one can be gone on with or cleared.
        files = [self.file, errors_path(self.file)] if self.file is not None else []
        for url in files:
            if _exists(url):
                _delete(url)
        filesystem, path = open_filesystem(self.checkpoints)
        for found in filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True)):
            filesystem.delete_file(found.path)
        for name in parts.files():
            parts.delete_file(name)
        _delete(self.journal)


def begin(places: JobPlaces, facts: Mapping[str, Any]) -> bool:
    """Writes down what a job is begun with; True if it has been begun before, with the same.

    Raises ConfigError, which names what differs, if it was begun with something else, or if the
    output holds files of no job.
    """
    # As it will be read: tuples have become lists.
    wanted = json.loads(json.dumps({"version": _VERSION, **facts}))
    found = _read(places.journal)
    if found is None:
        _refuse_strangers(places)
        places.make()
        _write(places.journal, json.dumps(wanted, indent=1, ensure_ascii=False))
        return False
    differences = list(_differences("", found, wanted))
    if differences:
        raise ConfigError(
            f"job: {places.journal} was begun otherwise, and --fresh begins again: "
            + "; ".join(differences)
        )
    return True


@contextmanager
def alone(places: JobPlaces) -> Iterator[None]:
    """Keeps a second run of the job on this machine out. Raises ConfigError if there is one.

    Elsewhere, and on filesystems without files of this machine, it keeps nobody out.
    """
    filesystem, path = open_filesystem(places.journal)
    if not isinstance(filesystem, fs.LocalFileSystem):
        yield
        return
    with open(path, "rb") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"job: {places.journal} is being worked on already") from None
        yield


def _refuse_strangers(places: JobPlaces) -> None:
    """A job does not write among, or over, files that it has not made."""
    if places.file is not None:
        for url in (places.file, errors_path(places.file)):
            if _exists(url):
                raise ConfigError(f"output: {url} is there already, and no job has made it")
        return
    filesystem, path = open_filesystem(places.parts)
    if filesystem.get_file_info(path).type == fs.FileType.File:
        raise ConfigError(f"output: {places.parts} is a file, expected a .jsonl or .parquet name")
    found = filesystem.get_file_info(fs.FileSelector(path, allow_not_found=True))
    # A job that was killed before it had a journal has left an empty folder.
    if any(info.base_name != _JOB for info in found):
        raise ConfigError(f"output: {places.parts} is not empty, and no job has filled it")


def _check_output(output: str) -> None:
    """Raises InvalidRequestError for what would become a folder of an odd name."""
    name = posixpath.basename(output.rstrip("/"))
    wanted = "a .jsonl or .parquet file, or a folder"
    if not name or name == "-" or "?" in output:
        raise InvalidRequestError("output", output, wanted)
    if kind_of(name) is not None and posixpath.splitext(name)[1] not in _FORMATS:
        raise InvalidRequestError("output", name, wanted)


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """Every field in which two journals differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(inner, found.get(key), wanted.get(key))
    elif found != wanted:
        shown = [
            cut_off(json.dumps(value, ensure_ascii=False), _SHOWN) for value in (found, wanted)
        ]
        yield f"{name} was {shown[0]} and is {shown[1]}"


def _read(journal: str) -> Any:
    """The journal's content; None if there is none. Raises ConfigError if it is damaged."""
    if not _exists(journal):
        return None
    filesystem, path = open_filesystem(journal)
    try:
        with filesystem.open_input_stream(path) as file:
            return json.loads(file.read())
    except ValueError:
        raise ConfigError(f"job: {journal} is damaged; --fresh begins again") from None


def _write(journal: str, text: str) -> None:
    """Writes the journal in one step, so that it is never seen in part."""
    filesystem, path = open_filesystem(journal)
    with filesystem.open_output_stream(f"{path}.new") as file:
        file.write(text.encode())
    filesystem.move(f"{path}.new", path)


def _exists(url: str) -> bool:
    filesystem, path = open_filesystem(url)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def _delete(url: str) -> None:
    filesystem, path = open_filesystem(url)
    filesystem.delete_file(path)
