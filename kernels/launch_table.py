"""How kernels are launched on a card: tables that were measured on it, beside the code's defaults.

    {"card": "NVIDIA H200", "made": {...}, "kernels": {"experts": [{"up_to": 8, "rows": 16, ...}]}}

`twotower bench --tune FILE` measures and writes such a table. Those in kernels/cards/ are used by
every process on a card of that name. Nothing is measured while a tower serves: the launch of a
shape is the same in every process, and so are the bits of its results. A kernel asks with its
default, which a table's entry changes in part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

CARDS = Path(__file__).parent / "cards"
# Bounds the size for which an entry is meant; the last of a kernel may have none.
_UP_TO = "up_to"

Entry = Mapping[str, Any]
Shape = TypeVar("Shape")


@dataclass(frozen=True)
class LaunchTable:
    """Entries of each kernel, in ascending order of the sizes up to which they hold."""

    card: str
    kernels: Mapping[str, Sequence[Entry]]

    @classmethod
    def read(cls, path: Path) -> LaunchTable:
        """Raises ValueError, with the file and the field, for what is no table."""
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            card, kernels = held["card"], {**held["kernels"]}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: got no table of launches: {error}") from None
        for name, entries in kernels.items():
            _check(f"{path}: {name}", entries)
        return cls(card, kernels)

    def entry(self, kernel: str, size: int) -> Entry:
        """The fields of the first entry that holds for `size`; none if there is no such entry."""
        for entry in self.kernels.get(kernel, ()):
            if size <= entry.get(_UP_TO, size):
                return {name: value for name, value in entry.items() if name != _UP_TO}
        return {}


EMPTY = LaunchTable("", {})
_used: LaunchTable | None = None


def tuned(kernel: str, size: int, default: Shape, device: torch.device) -> Shape:
    """`default`, a dataclass, with what the device's table says of a kernel at this size: tokens of
    a pass, or whatever the kernel counts. Raises ValueError for a field that the kernel lacks."""
    entry = table_of(device).entry(kernel, size)
    if not entry:
        return default
    launch: Any = default
    known = {field.name for field in fields(launch)}
    unknown = sorted(set(entry) - known)
    if unknown:
        names = ", ".join(sorted(known))
        raise ValueError(f"launch table, {kernel}: got {unknown[0]!r}, expected of {names}")
    return cast(Shape, replace(launch, **entry))


@contextmanager
def using(table: LaunchTable) -> Iterator[None]:
    """Inside, every device has this table, in all threads: for measurements and tests."""
    global _used
    before, _used = _used, table
    try:
        yield
    finally:
        _used = before


def table_of(device: torch.device) -> LaunchTable:
    """The table of a device's card; an empty one where there is none."""
    if _used is not None:
        return _used
    if device.type != "cuda":
        return EMPTY
    return _table(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _table(index: int) -> LaunchTable:
    card = torch.cuda.get_device_name(index)
    path = CARDS / file_name(card)
    if not path.exists():
        return EMPTY
    table = LaunchTable.read(path)
    if table.card != card:
        raise ValueError(f"{path}: got a table of {table.card!r}, expected one of {card!r}")
    return table


def file_name(card: str) -> str:
    """The file in which a card's table is kept: `NVIDIA H200` has nvidia_h200.json."""
    return "_".join(card.lower().split()) + ".json"


def _check(where: str, entries: object) -> None:
    """Raises ValueError for what are no entries of a kernel: a list of objects with positive whole
    numbers or flags, in ascending order of their bounds."""
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{where}: got {entries!r}, expected a list of objects")
    for entry in entries:
        for name, value in entry.items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(
                    f"{where}: got {name} {value!r}, expected a whole number or a flag"
                )
    bounds = [entry.get(_UP_TO) for entry in entries]
    if any(bound is None for bound in bounds[:-1]):
        raise ValueError(f"{where}: got an entry without {_UP_TO!r} before the last")
    known = [bound for bound in bounds if bound is not None]
    if known != sorted(set(known)):
        raise ValueError(f"{where}: got {_UP_TO} {known}, expected ascending numbers")
