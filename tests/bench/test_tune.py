"""Tables of launches from timed trials, and the trials themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from twotower.bench import tune as module
from twotower.bench.command import main
from twotower.bench.timing import launch_seconds
from twotower.bench.tune import Timed, defaults, entries_of, trials, tune
from twotower.kernels import replay_triton
from twotower.kernels.launch_table import LaunchTable, table_of, tuned, using

CPU = torch.device("cpu")


def timed(kernel: str, size: int, *tried: tuple[int, float]) -> list[Timed]:
    """The present launch, then launches of so many warps, in so many microseconds."""
    now, *others = tried
    return [
        Timed(kernel, size, {}, now[1]),
        *(Timed(kernel, size, {"warps": warps}, us) for warps, us in others),
    ]


def test_an_entry_is_kept_where_it_is_clearly_faster() -> None:
    found = timed("scan", 1, (0, 10.0), (4, 9.9), (8, 9.8))
    found += timed("scan", 16, (0, 10.0), (4, 7.0), (8, 6.0))
    assert entries_of(found) == {"scan": [{"up_to": 1}, {"warps": 8}]}
    tiles = [Timed("experts", own.size, own.entry, own.us) for own in found]
    assert entries_of(tiles) == {"experts": [{"up_to": 1}, {"up_to": 16, "warps": 8}]}


def test_neighbouring_sizes_with_one_launch_share_an_entry() -> None:
    found = [
        own for size in (64, 1, 16) for own in timed("scan", size, (0, 10.0), (4, 5.0), (8, 6.0))
    ]
    found += timed("replay", 1, (0, 5.0), (4, 6.0))
    assert entries_of(found) == {"scan": [{"warps": 4}]}


def test_every_trial_is_a_launch_that_its_kernel_takes() -> None:
    """A kernel whose trials its default could not take would fail on the card only."""
    known = defaults("tiny")
    kernels: dict[str, int] = {}
    narrow = (own for own in trials("tiny", CPU, [1], "fp8") if own.kernel == "experts_fp8")
    for trial in [*trials("tiny", CPU, [1, 2]), *narrow]:
        kernels[trial.kernel] = kernels.get(trial.kernel, 0) + 1
        with using(LaunchTable("", {trial.kernel: [trial.entry]})):
            tuned(trial.kernel, trial.size, known[trial.kernel], CPU)
    assert set(kernels) == set(known) - {"attention_piece"}
    assert kernels.pop("overlap") == 2
    dense = [kernels.pop(name) for name in list(kernels) if name.startswith("linear_")]
    # Both at 1, 2, 16 and 32 tokens.
    assert dense == [8] * len(dense)
    assert dense
    assert all(count > 4 for count in kernels.values())


def test_what_is_measured_becomes_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a card, with times that prefer eight channels of the replay and one that fails."""

    def seconds(_work: object, device: torch.device) -> float:
        channels = tuned("replay_token", 1, replay_triton.SLICE, device).channels
        if channels == 64:
            raise RuntimeError("out of resource: shared memory")
        return 1e-6 * channels

    class Card:
        type = "cuda"

    monkeypatch.setattr(module, "launch_seconds", seconds)
    monkeypatch.setattr(module, "_compile_beside", lambda *_: None)
    monkeypatch.setattr(module.Want, "is_given_by", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    monkeypatch.setattr(module, "_card", lambda _: "NVIDIA Some 9")
    monkeypatch.setattr(module, "table_of", lambda _: LaunchTable("", {}))
    only = [own for own in trials("tiny", CPU, [1]) if own.kernel == "replay_token"]
    monkeypatch.setattr(module, "trials", lambda *_: iter(only))
    out, said = tmp_path / "card.json", []
    tune("tiny", Card(), [1], out, said.append)  # type: ignore[arg-type]
    table = LaunchTable.read(out)
    assert table.card == "NVIDIA Some 9"
    assert table.kernels["replay_token"] == [{"channels": 8, "num_warps": 1}]
    assert json.loads(out.read_text())["made"]["preset"] == "tiny"
    assert said[-1] == "replay_token at 1: 16.0 us now, best 8.0 us"


def test_a_launch_that_gives_other_numbers_is_no_launch_for_the_table() -> None:
    want = torch.randn(64, generator=torch.Generator().manual_seed(0))
    assert module.agree(want.bfloat16(), want)
    assert module.agree(None, want)
    wrong = want.clone()
    wrong[7] = 5.0
    assert not module.agree(wrong, want)
    wrong[7] = float("nan")
    assert not module.agree(wrong, want)
    assert module.agree(want.clone(), want, exactly=True)
    assert not module.agree(want * (1 + 1e-6), want, exactly=True)


def test_passes_of_all_kinds_prove_that_launches_may_overlap() -> None:
    """Twice the same numbers, though each pass moves states."""
    plain, overlapping = (own for own in trials("tiny", CPU, [1]) if own.kernel == "overlap")
    assert overlapping.exact
    first, second = overlapping.compared(), plain.compared()
    assert isinstance(first, torch.Tensor)
    assert torch.equal(first, second)
    assert len(first) == 1 + 4 + 64 + 256 + 64
    assert bool(first.isfinite().all())


def test_the_command_writes_an_empty_table_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    assert main(["--tune", str(out), "--device", "cpu", "--batches", "1"]) == 0
    assert LaunchTable.read(out).kernels == {}


def test_without_a_card_there_is_no_table() -> None:
    assert table_of(CPU).kernels == {}
    assert launch_seconds(lambda: None, CPU) >= 0
