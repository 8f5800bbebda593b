"""Where a job keeps its files, and what it was begun with: the same command goes on, another is
refused."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs

from twotower.batch.locations import Location
from twotower.towers.errors import ConfigError, shorten

Format = Literal["jsonl", "parquet"]
_FORMATS: dict[str, Format] = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_VERSION = 1
_SHOWN = 120


@dataclass(frozen=True)
class JobPlaces:
    """A job's output and the folders beside it.

    A file as output is joined at the end from parts in `OUTPUT.job/parts`; a folder as output holds
    the parts themselves. `file` is None for a folder.
    """

    format: Format
    file: Location | None
    parts: Location
    checkpoint: Location
    journal: Location

    @classmethod
    def of(cls, output: Location, wanted: Format | None) -> JobPlaces:
        """The places for an output. Raises ConfigError if its suffix and the wanted format
        contradict each other."""
        named = _FORMATS.get(posixpath.splitext(output.path)[1])
        if named is not None and wanted not in (None, named):
            raise ConfigError(f"format: got {wanted!r} for {output.name}, expected {named!r}")
        job = output.beside(".job") if named is not None else output / "_job"
        parts = job / "parts" if named is not None else output
        return cls(
            named or wanted or "jsonl",
            output if named is not None else None,
            parts,
            job / "checkpoint",
            job / "job.json",
        )

    def make(self) -> None:
        """Makes the folders."""
        for folder in (self.parts, self.checkpoint):
            folder.filesystem.create_dir(folder.path, recursive=True)

    def clear(self) -> None:
        """Deletes what a job has left, its output too."""
        if self.journal.exists():
            # Last: what has a journal can be gone on with or cleared.
            for folder in (self.parts, self.checkpoint):
                folder.filesystem.delete_dir_contents(folder.path, missing_dir_ok=True)
            if self.file is not None and self.file.exists():
                self.file.filesystem.delete_file(self.file.path)
            self.journal.filesystem.create_dir(posixpath.dirname(self.journal.path))
            if self.journal.exists():
                self.journal.filesystem.delete_file(self.journal.path)


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
            f"job: {places.journal.name} was begun otherwise, and --fresh begins again: "
            + "; ".join(differences)
        )
    return True


def _refuse_strangers(places: JobPlaces) -> None:
    """A job does not write among, or over, files that it has not made."""
    if places.file is not None and places.file.exists():
        raise ConfigError(f"output: {places.file.name} is there already, and no job has made it")
    selector = fs.FileSelector(places.parts.path, allow_not_found=True)
    if places.file is None and places.parts.filesystem.get_file_info(selector):
        raise ConfigError(f"output: {places.parts.name} is not empty, and no job has filled it")


def _differences(name: str, found: Any, wanted: Any) -> Iterator[str]:
    """Every field in which two journals differ, with both values."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(inner, found.get(key), wanted.get(key))
    elif found != wanted:
        shown = [
            shorten(json.dumps(value, ensure_ascii=False), _SHOWN) for value in (found, wanted)
        ]
        yield f"{name} was {shown[0]} and is {shown[1]}"


def _read(journal: Location) -> Any:
    """The journal's content; None if there is none. Raises ConfigError if it is damaged."""
    if not journal.exists():
        return None
    try:
        with journal.filesystem.open_input_stream(journal.path) as file:
            return json.loads(file.read())
    except (ValueError, pa.ArrowInvalid):
        raise ConfigError(f"job: {journal.name} is damaged; begin again with --fresh") from None


def _write(journal: Location, text: str) -> None:
    """Writes the journal in one step, so that it is never seen in part."""
    scratch = f"{journal.path}.new"
    with journal.filesystem.open_output_stream(scratch) as file:
        file.write(text.encode())
    journal.filesystem.move(scratch, journal.path)
