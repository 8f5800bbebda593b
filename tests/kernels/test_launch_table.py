"""Tables of launches: reading, choosing, refusing, and that every table kept here fits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.support.comparing import assert_same_bits, normal
from twotower.kernels import launch_table
from twotower.kernels.launch_table import CARDS, LaunchTable, file_name, tuned, using
from twotower.kernels.rows import Rows

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    rows: int = 16
    warps: int = 4


TABLE = LaunchTable("card", {"scan": [{"up_to": 8, "rows": 32}, {"up_to": 64, "warps": 8}]})


@pytest.mark.parametrize(
    ("size", "want"), [(1, Shape(32)), (8, Shape(32)), (9, Shape(warps=8)), (65, Shape())]
)
def test_the_first_entry_that_holds_changes_the_default(size: int, want: Shape) -> None:
    with using(TABLE):
        assert tuned("scan", size, Shape(), CPU) == want
        assert tuned("other", size, Shape(), CPU) == Shape()
    assert tuned("scan", size, Shape(), CPU) == Shape()


def test_an_entry_without_a_bound_holds_for_every_size() -> None:
    with using(LaunchTable("card", {"scan": [{"up_to": 2, "rows": 1}, {"rows": 2}]})):
        assert [tuned("scan", size, Shape(), CPU).rows for size in (2, 3, 10**6)] == [1, 2, 2]


def test_a_field_that_the_kernel_lacks_is_named() -> None:
    with (
        using(LaunchTable("card", {"scan": [{"stages": 3}]})),
        pytest.raises(ValueError, match="launch table, scan: got 'stages', expected of rows"),
    ):
        tuned("scan", 1, Shape(), CPU)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no table of launches"),
        ("[]", "no table of launches"),
        ('{"card": "a"}', "no table of launches"),
        ('{"card": "a", "kernels": {"scan": [{}, {"up_to": 3}]}}', "scan: got an entry without"),
        ('{"card": "a", "kernels": []}', "no table of launches|expected a list"),
        ('{"card": "a", "kernels": {"scan": {"rows": 1}}}', "scan: got .* expected a list of obj"),
        ('{"card": "a", "kernels": {"scan": [3]}}', "scan: got .* expected a list of objects"),
        (
            '{"card": "a", "kernels": {"scan": [{"rows": "16"}]}}',
            "scan: got rows '16', expected a whole number",
        ),
        (
            '{"card": "a", "kernels": {"scan": [{"up_to": 4}, {"up_to": 3}]}}',
            r"scan: got up_to \[4, 3\], expected ascending",
        ),
    ],
)
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        LaunchTable.read(path)
    with pytest.raises(ValueError, match="no table of launches"):
        LaunchTable.read(tmp_path / "missing.json")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that says that it is a card of some name."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Some 9")
    launch_table._table.cache_clear()
    return torch.device("cuda", 0)


def write(path: Path, card: str) -> None:
    path.write_text(json.dumps({"card": card, "kernels": {"scan": [{"rows": 99}]}}))


def test_a_card_gets_the_table_of_its_name_and_no_other(
    card: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_table, "CARDS", tmp_path)
    assert tuned("scan", 1, Shape(), card) == Shape()
    launch_table._table.cache_clear()
    write(tmp_path / "nvidia_some_9.json", "NVIDIA Some 9")
    assert tuned("scan", 1, Shape(), card) == Shape(99)
    assert tuned("scan", 1, Shape(), CPU) == Shape()
    launch_table._table.cache_clear()
    write(tmp_path / "nvidia_some_9.json", "NVIDIA Other")
    with pytest.raises(ValueError, match="got a table of 'NVIDIA Other', expected one of 'NVIDIA"):
        tuned("scan", 1, Shape(), card)


@pytest.mark.parametrize("path", sorted(CARDS.glob("*.json")), ids=lambda path: path.stem)
def test_tables_that_are_kept_here_fit_the_kernels(path: Path) -> None:
    """Every entry can be taken by its kernel, and the file has its card's name."""
    pytest.importorskip("triton")
    from twotower.bench.tune import defaults

    table = LaunchTable.read(path)
    assert path.name == file_name(table.card)
    known = defaults()
    with using(table):
        for kernel, entries in table.kernels.items():
            for entry in entries:
                tuned(kernel, entry.get("up_to", 1), known[kernel], CPU)


def test_a_table_changes_how_a_kernel_is_launched_and_not_what_it_gives() -> None:
    """The replay's bits do not depend on its launch."""
    replay_triton = pytest.importorskip("twotower.kernels.replay_triton")
    from twotower.kernels.replay import ReplayWeights

    heads, head_dim, state_dim, groups, layers = 2, 16, 16, 1, 1
    inner = heads * head_dim
    channels = inner + 2 * groups * state_dim
    weights = ReplayWeights(
        normal(layers, channels, 4), normal(layers, channels), *normal(2, layers, heads), groups
    )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pages = torch.zeros(1, 1, dtype=torch.int32, device=device)
    rows = Rows.build([3], [0], [0], pages, 16)
    states = []
    for table in (launch_table.EMPTY, LaunchTable("", {"replay_block": [{"channels": 4}]})):
        ssm, conv = normal(1, layers, heads, head_dim, state_dim), normal(1, layers, 3, channels)
        with using(table):
            replay_triton.replay(
                ssm,
                conv,
                normal(layers, 3, channels, seed=5),
                normal(layers, 3, heads, seed=6),
                weights,
                rows,
                torch.tensor([3], dtype=torch.int32),
            )
        states.append((ssm, conv))
    for own, other in zip(*states, strict=True):
        assert_same_bits(own, other)
