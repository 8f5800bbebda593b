"""Launches of a pass, counted without a GPU: `python -m benchmarks.gpu.launches [--rows 1 16]`.

Runs the engines' own programs at the 30B pattern with narrow layers on a CPU. Triton's kernels are
counted and not run, of torch's operators each that makes or changes a tensor counts as a launch.
What a graph holds is counted, and with it the two transfers of a call; of a pass that is no graph,
all that it does.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import KernelInterface

from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.random_towers import TowerMaker
from twotower.kernels import dispatch, linear
from twotower.kernels.dispatch import force
from twotower.planner.shapes import PRESETS
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.decoding.unmasking import ThresholdRule
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.engine.cuda_graph import CapturedGraph, GraphMemory
from twotower.towers.engine.denoiser_steps import DenoiserSteps
from twotower.towers.engine.device_drafts import DeviceDraft
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState

KINDS = ("denoise", "ar", "extend", "draft", "prefill")
# Inputs to the device and results from it, one transfer each.
_TRANSFERS = 2
_CONTEXT = 64
_BLOCK = 16
_CHUNK = 256
# Operators that only allocate, or read on the host.
_ALLOCATES = ("empty", "empty_like", "new_empty", "empty_strided")
_NO_LAUNCH = (*_ALLOCATES, "lift_fresh", "_local_scalar_dense")
# A product is one launch, whatever torch makes of it on a CPU.
_PRODUCT = "product"


class _Recorder(TorchDispatchMode):
    """Counts launches by name while it is `on`. Empty tensors become zeros, as kernels that would
    fill them do not run and their values may be indices."""

    def __init__(self) -> None:
        super().__init__()
        self.on = False
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in _ALLOCATES:
            return result.zero_()
        if self.on and name not in _NO_LAUNCH and not _is_view(func, args, result):
            self.found[name] += 1
        return result

    def kernel(self, function: Any) -> None:
        """Counts a kernel's launch."""
        if self.on:
            self.found[function.fn.__name__] += 1


def _is_view(func: Any, args: Sequence[Any], result: Any) -> bool:
    """True if an operator only looks at its first argument in another way."""
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor):
        return False
    parts = result if isinstance(result, (tuple, list)) else (result,)
    storage = args[0].untyped_storage().data_ptr()
    return all(
        not isinstance(part, Tensor) or part.untyped_storage().data_ptr() == storage
        for part in parts
    )


@contextmanager
def recording(*, graphs_only: bool = True) -> Iterator[Counter[str]]:
    """Inside, the operators of towers launch their kernels, which are counted and not run.

    With `graphs_only` what lies in graphs is counted, otherwise everything.
    """
    recorder = _Recorder()
    recorder.on = not graphs_only
    replay = CapturedGraph.__call__

    def launch(kernel: Any, _grid: object) -> Callable[..., None]:
        return lambda *_args, **_options: recorder.kernel(kernel)

    def counted(graph: CapturedGraph) -> None:
        recorder.on = True
        replay(graph)
        recorder.on = not graphs_only

    multiply = linear.linear

    def product(*args: Any, **kwargs: Any) -> Tensor:
        on, recorder.on = recorder.on, False
        recorder.found[_PRODUCT] += on
        out = multiply(*args, **kwargs)
        recorder.on = on
        return out

    with (
        force("triton"),
        patch.object(KernelInterface, "__getitem__", launch),
        patch.object(CapturedGraph, "__call__", counted),
        patch.object(dispatch.linear, "reference", product),
        recorder,
    ):
        yield recorder.found
    if graphs_only:
        recorder.found["transfer"] = _TRANSFERS


@dataclass(frozen=True)
class Bench:
    """Both towers of a pattern with narrow layers, and states of some rows."""

    context: ContextTower
    denoiser: DenoiserTower
    pool: FilledPool

    @classmethod
    def of(cls, config: TwoTowerConfig, rows: int) -> Bench:
        """Random bf16 towers, with the router's narrow parts that a GPU has."""
        device, generator = torch.device("cpu"), torch.Generator().manual_seed(0)
        maker = TowerMaker(config, device, torch.bfloat16, generator, narrow=True)
        pages = pages_of_rows(rows, _CONTEXT + _CHUNK)
        pool = FilledPool(config, rows, pages, device, torch.bfloat16)
        return cls(maker.context(), maker.denoiser(), pool)

    def count(self, kind: str, rows: int) -> Counter[str]:
        """Launches of a pass by name. Raises KeyError for a kind that is not in KINDS."""
        passes: dict[str, Callable[[list[ContextState]], Counter[str]]] = {
            "denoise": self._denoise,
            "ar": lambda states: self._context(states, [_step(state) for state in states]),
            "extend": lambda states: self._context(states, [_block(state) for state in states]),
            "draft": lambda states: self._context(states, [_draft(state) for state in states]),
            "prefill": self._prefill,
        }
        with self.pool.rows_at(_CONTEXT, rows, _CHUNK) as states:
            return passes[kind](states)

    def _denoise(self, states: list[ContextState]) -> Counter[str]:
        steps = DenoiserSteps(self.denoiser)
        rule, sampler = ThresholdRule(0.8, 1), _sampler()
        works = [
            (state, DeviceDraft(_BLOCK, state.position, (), rule, sampler, 0, fixed_step=False))
            for state in states
        ]
        with recording() as found:
            steps.run(works)
        return found

    def _context(self, _states: list[ContextState], works: list[ContextWork]) -> Counter[str]:
        memory, log = GraphMemory(self.context.device), BlockLog(self.context)
        passes = ContextPass(
            self.context,
            ContextSteps(self.context, memory),
            ContextBlocks(self.context, memory, log),
            ContextDrafts(self.context, memory, log),
        )
        with recording() as found:
            passes.run(works)
        return found

    def _prefill(self, states: list[ContextState]) -> Counter[str]:
        works = [ContextWork(state, [1] * _CHUNK, prefill=True) for state in states]
        with recording(graphs_only=False) as found:
            ContextPass(self.context).run(works)
        return found


def _sampler() -> Sampler:
    return Sampler(0.0, None, None, None, 0)


def _step(state: ContextState) -> ContextWork:
    return ContextWork(state, [1], draw=Draw(_sampler(), [state.position]))


def _block(state: ContextState) -> ContextWork:
    return ContextWork(state, [1] * _BLOCK)


def _draft(state: ContextState) -> ContextWork:
    positions = range(state.position, state.position + _BLOCK)
    draw = Draw(_sampler(), positions)
    return ContextWork(state, [1] * _BLOCK, draw=draw, accepts=True)


def narrow_preset(name: str = "30b") -> TwoTowerConfig:
    """A preset's pattern with the layers of the tiny one."""
    return replace(PRESETS["tiny"], layer_pattern=PRESETS[name].layer_pattern)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--names", action="store_true", help="every launch by its name")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench.of(narrow_preset(args.preset), max(args.rows))
    lines = []
    print("| pass | rows | launches |\n|---|---|---|")
    for kind in KINDS:
        for rows in args.rows:
            found = bench.count(kind, rows)
            lines.append({"kind": kind, "rows": rows, "launches": found.total(), "names": found})
            print(f"| {kind} | {rows} | {found.total()} |")
            if args.names:
                print(json.dumps(dict(found.most_common())))
    if args.out:
        args.out.write_text(json.dumps(lines, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
