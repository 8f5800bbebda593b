"""Measures how a card's kernels are launched best, and writes the table that processes there use.

    twotower bench --tune nvidia_some_card.json --preset 30b

Every trial is launched once by several processes side by side, which fill Triton's cache, and then
timed by this one alone. An entry is kept where it is faster than the present launch by more than
runs differ, and gives the same numbers but for rounding, every time; passes of sizes between two
that were measured take the launch of the larger.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from twotower.bench.timing import launch_seconds
from twotower.bench.tune_trials import (
    Experts,
    Maker,
    Mixers,
    NarrowExperts,
    Passes,
    Products,
    Trial,
)
from twotower.kernels import (
    attention_triton,
    chunk_scan_triton,
    experts_triton,
    mamba_scan_triton,
    replay_triton,
)
from twotower.kernels.launch_table import Entry, LaunchTable, table_of, using
from twotower.kernels.linear_choice import LIBRARY, entry_name
from twotower.kernels.overlap_triton import OVERLAP

# Kernels that have other launches for more tokens than were measured.
_BY_TOKENS = ("experts", "experts_fp8", "scan_piece")
# By how much a launch must be faster than the present one.
_GAIN = 0.03
_COMPILERS = 7
_COMPILE_SECONDS = 100.0
_TRIALS: dict[str, tuple[type[Maker], ...]] = {
    "full": (Passes, Products, Experts, Mixers),
    "fp8": (Passes, Products, NarrowExperts, Mixers),
}
# Relative error of a launch's result against the present launch's, in bf16, and how often it is
# looked at: what is launched too early may be right most of the time.
_ERROR = 2e-2
_LOOKS = 20


@dataclass(frozen=True)
class Timed:
    """A trial's kernel, size and entry, and the microseconds of a launch."""

    kernel: str
    size: int
    entry: Entry
    us: float


def defaults(preset: str = "30b") -> dict[str, Any]:
    """The launch of each kernel where no table says anything, at its smallest size; of dense
    products those of a preset's narrow weights."""
    scan = mamba_scan_triton
    shapes = Products(preset, torch.device("cpu")).shapes
    return {
        **dict.fromkeys((entry_name(*shape) for shape in shapes), LIBRARY),
        "overlap": OVERLAP,
        "experts": experts_triton.tiling_of(1, torch.bfloat16),
        "experts_fp8": experts_triton.fp8_tiling_of(1, torch.bfloat16),
        "scan_token": scan.TOKEN_TILE,
        "scan_block": scan.tile_of(2),
        "scan_piece": chunk_scan_triton.TILE,
        "replay_token": replay_triton.SLICE,
        "replay_block": replay_triton.SLICE,
        "attention_token": attention_triton.tiling_for(torch.bfloat16, 1),
        "attention_block": attention_triton.tiling_for(torch.bfloat16, attention_triton.BLOCK_ROWS),
        "attention_piece": attention_triton.tiling_for(
            torch.bfloat16, attention_triton.BLOCK_ROWS + 1
        ),
    }


def tune(
    preset: str,
    device: torch.device,
    rows: Sequence[int],
    out: Path,
    say: Callable[[str], None],
    experts: str = "full",
) -> LaunchTable:
    """Times all trials for so many rows and writes the table to `out`, after each kernel and size.
    `experts` "fp8" tries products of experts in 8 bits in place of those in 16.

    On a CPU, where nothing can be timed, every trial is named and the table stays empty.
    """
    if device.type == "cuda":
        say(f"compiling in {_COMPILERS} processes")
        _compile_beside(preset, device, rows, experts)
    before = table_of(device)
    found: list[Timed] = []
    for kernel, size, same in _by_size(trials(preset, device, rows, experts)):
        timed = _all_timed(same, device, before)
        if timed:
            best = min(timed, key=lambda own: own.us)
            say(f"{kernel} at {size}: {_first(timed).us:.1f} us now, best {best.us:.1f} us")
        else:
            say(f"{kernel} at {size}: {len(same)} launches to try")
        found += timed
        _write(out, device, preset, entries_of(found))
    return LaunchTable(_card(device), entries_of(found))


def trials(
    preset: str, device: torch.device, rows: Sequence[int], experts: str = "full"
) -> Iterator[Trial]:
    """All trials, those of one kernel and size one after another."""
    for make in _TRIALS[experts]:
        maker = make(preset, device)
        for count in sorted(rows):
            yield from maker.trials(count)


def entries_of(found: Sequence[Timed]) -> dict[str, list[Entry]]:
    """The best entry of each kernel and size, with the size up to which it holds. A size at which
    nothing is enough faster than the present launch keeps that, as an entry without fields."""
    entries: dict[str, list[Entry]] = {}
    for kernel in dict.fromkeys(own.kernel for own in found):
        chosen: list[dict[str, Any]] = []
        for size in sorted({own.size for own in found if own.kernel == kernel}):
            same = [own for own in found if (own.kernel, own.size) == (kernel, size)]
            best, now = min(same, key=lambda own: own.us), _first(same)
            entry = best.entry if best.us < (1 - _GAIN) * now.us else now.entry
            if chosen and {**chosen[-1], "up_to": size} == {**entry, "up_to": size}:
                chosen[-1]["up_to"] = size
            else:
                chosen.append({"up_to": size, **entry})
        if any(len(entry) > 1 for entry in chosen):
            if kernel not in _BY_TOKENS:
                # Sized by rows, of which programs have one more, of padding.
                del chosen[-1]["up_to"]
            entries[kernel] = [dict(entry) for entry in chosen]
    return entries


def _first(timed: Sequence[Timed]) -> Timed:
    """The present launch, which is tried first."""
    return timed[0]


def _by_size(given: Iterator[Trial]) -> Iterator[tuple[str, int, list[Trial]]]:
    """Trials of one kernel and size together, in their order."""
    same: list[Trial] = []
    for trial in given:
        if same and (same[0].kernel, same[0].size) != (trial.kernel, trial.size):
            yield same[0].kernel, same[0].size, same
            same = []
        same.append(trial)
    if same:
        yield same[0].kernel, same[0].size, same


def _all_timed(same: Sequence[Trial], device: torch.device, before: LaunchTable) -> list[Timed]:
    """The times of trials of one kernel and size, the present launch first; none if that cannot be
    launched here, and on a CPU. Raises RuntimeError once nothing can be launched any more."""
    if device.type != "cuda":
        return []
    timed: list[Timed] = []
    want: Want | None = None
    for trial in same:
        try:
            if want is None:
                want = Want(trial, before)
            own = _timed(trial, device, before, want)
        except (RuntimeError, triton.OutOfResources):
            # Ends here after an error that no later launch gets past.
            torch.cuda.synchronize(device)
            own = None
        if own is not None:
            timed.append(own)
        elif not timed:
            return []
    return timed


def _timed(trial: Trial, device: torch.device, before: LaunchTable, want: Want) -> Timed | None:
    """The time of a trial, None where it gives another result than is wanted. Raises RuntimeError
    or OutOfResources where it does not fit the device."""
    with using(_with(before, trial)):
        if not want.is_given_by(trial):
            return None
        seconds = launch_seconds(trial.work, device)
    entry = trial.entry or before.entry(trial.kernel, trial.size)
    return Timed(trial.kernel, trial.size, entry, 1e6 * seconds)


class Want:
    """What the present launch gives, with which others are compared: as bits where a trial changes
    no arithmetic, otherwise but for rounding. Work that only changes a state gives nothing."""

    def __init__(self, trial: Trial, before: LaunchTable) -> None:
        with using(_with(before, trial)):
            self._result = _copy(trial.compared())

    def is_given_by(self, trial: Trial) -> bool:
        """Runs the trial's work as it stands in a graph, several times: what is launched too early
        may be right most of the time, and is early only where the host is ahead."""
        if self._result is None:
            return True
        replay, result = _replayed(trial.compared)
        for _ in range(_LOOKS):
            replay()
            if not agree(_copy(result), self._result, exactly=trial.exact):
                return False
        return True


def _copy(made: object) -> Tensor | None:
    return made.clone() if isinstance(made, Tensor) else None


def _replayed(work: Callable[[], object]) -> tuple[Callable[[], None], object]:
    """A replay of the work's graph, and what it fills."""
    for _ in range(2):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = work()
    return graph.replay, made


def agree(got: Tensor | None, want: Tensor | None, *, exactly: bool = False) -> bool:
    """True if two results are equal, or unless `exactly` differ by rounding at most, or there is
    nothing to compare."""
    if got is None or want is None:
        return True
    if exactly:
        return torch.equal(got, want)
    error = (got.double() - want.double()).norm() / want.double().norm()
    return bool(error < _ERROR)


def _with(before: LaunchTable, trial: Trial) -> LaunchTable:
    """The table with a trial's entry for every size of its kernel."""
    if not trial.entry:
        return before
    return LaunchTable(before.card, {**before.kernels, trial.kernel: [trial.entry]})


def _compile_beside(preset: str, device: torch.device, rows: Sequence[int], experts: str) -> None:
    """Launches every trial once, in processes side by side, for at most so many seconds."""
    words = (preset, str(device), ",".join(map(str, rows)), experts, str(_COMPILERS))
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "twotower.bench.tune", *words, str(part)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for part in range(_COMPILERS)
    ]
    for process in processes:
        try:
            process.wait(_COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            # What it has not compiled is compiled when it is timed.
            process.kill()
            process.wait()


def compile_part(
    preset: str, device: torch.device, rows: Sequence[int], experts: str, parts: int, part: int
) -> None:
    """Launches every `parts`-th trial once, from `part` on."""
    before = table_of(device)
    for index, trial in enumerate(trials(preset, device, rows, experts)):
        if index % parts == part:
            with using(_with(before, trial)):
                try:
                    trial.work()
                except (RuntimeError, triton.OutOfResources):
                    continue


def _write(
    out: Path, device: torch.device, preset: str, entries: Mapping[str, Sequence[Entry]]
) -> None:
    made = {
        "date": date.today().isoformat(),
        "preset": preset,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    table = {"card": _card(device), "made": made, "kernels": entries}
    out.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(arguments: Sequence[str]) -> None:
    """Compiles a part of the trials: preset, device, rows, experts, number of parts, part."""
    preset, device, rows, experts, parts, part = arguments
    numbers = [int(count) for count in rows.split(",")]
    compile_part(preset, torch.device(device), numbers, experts, int(parts), int(part))


if __name__ == "__main__":
    main(sys.argv[1:])
