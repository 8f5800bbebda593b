"""Times tilings of kernels: `python -m benchmarks.gpu.tune --kernel experts --out FILE`.

Tries each tiling on one layer of the 30B model, as the tables of the kernels would launch it. With
`--compile` every launch is made once and nothing is timed, so that several processes can fill the
cache of compiled kernels before one of them measures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.products import launch_seconds
from twotower.bench.filled import FilledPool
from twotower.bench.random_towers import TowerMaker
from twotower.kernels import attention_triton, experts_triton, mamba_scan_triton, replay_triton
from twotower.kernels.experts_triton import Tiling
from twotower.kernels.mamba_scan_triton import Tile
from twotower.kernels.rows import Rows
from twotower.planner.floors import expected_unique
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import PRESETS
from twotower.towers.model.backbone import scan_weights
from twotower.towers.model.weights import MambaWeights
from twotower.towers.state.context_state import rows_of
from twotower.towers.state.pages import pages_for

Entry = dict[str, Any]
# Rows of a tile by tokens of the pass: the rows of most experts should fit into a tile.
_ROWS = ((64, (16,)), (128, (16,)), (320, (16, 32)), (768, (32, 64)), (1536, (64, 128)))
_MOST_SHARED = 200_000
_CONTEXT = 4096
_SHOWN = 4


def tilings(tokens: int) -> Iterator[Tiling]:
    """Tilings to try for so many tokens, in bf16."""
    rows = next((tiles for most, tiles in _ROWS if tokens <= most), (128,))
    for tile_rows, channels, inner, warps in product(rows, (32, 64, 128), (64, 128), (4, 8)):
        if warps == 8 and tile_rows * channels < 4096:
            continue
        stage = (tile_rows + channels) * inner * 2
        for stages in (3, 4, 5, 6):
            resident = min(6, _MOST_SHARED // (stage * stages), 16 // warps)
            if resident and stage * stages * resident > 60_000:
                yield Tiling(tile_rows, channels, inner, warps, stages, resident)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kernel", default="experts", choices=["experts", "mixers"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], help="this share of all")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    trials = EXPERTS if args.kernel == "experts" else MIXERS
    tuner = trials(args.preset, device)
    lines: list[Entry] = []
    for rows in args.rows:
        for change in list(tuner.changes(rows))[args.part[0] :: args.part[1]]:
            lines.append(_tried(change, device, timed=not args.compile))
        args.out.write_text(json.dumps({"products": _best(lines)}, indent=1), encoding="utf-8")
    print(json.dumps(_best(lines), indent=1))


def _best(lines: list[Entry]) -> list[Entry]:
    """The fastest launches of each kernel and number of rows, and that of the kernels' tables."""
    found: list[Entry] = []
    for key in dict.fromkeys((line["kernel"], line["rows"]) for line in lines):
        same = [line for line in lines if (line["kernel"], line["rows"]) == key]
        timed = sorted((line for line in same if line.get("us")), key=lambda line: line["us"])
        found += [*timed[:_SHOWN], *(line for line in timed[_SHOWN:] if line["change"] == "-")]
        found += [line for line in same if "error" in line][:1]
    return found


@dataclass(frozen=True)
class Change:
    """A way to launch a kernel: `values` replace names of its module while `work` runs."""

    kernel: str
    rows: int
    name: str
    module: ModuleType
    values: Mapping[str, Any]
    work: Callable[[], object]


def _tried(change: Change, device: torch.device, *, timed: bool) -> Entry:
    found = {"kernel": change.kernel, "rows": change.rows, "change": change.name}
    if device.type != "cuda":
        return found
    with ExitStack() as stack:
        for name, value in change.values.items():
            stack.enter_context(patch.object(change.module, name, value))
        try:
            if timed:
                return {**found, "us": round(1e6 * launch_seconds(change.work, device), 1)}
            change.work()
        except Exception as error:  # a tiling that does not fit the device is a finding
            return {**found, "error": f"{type(error).__name__}: {error}"[:120]}
    return found


class _Experts:
    """Experts of one layer, and tokens that choose as many of them as text does."""

    def __init__(self, preset: str, device: torch.device) -> None:
        self.config, self.device = PRESETS[preset], device
        config = self.config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shared, count = config.moe_shared_expert_intermediate_size, config.n_routed_experts
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.up, self.down = self._normal(count, width, hidden), self._normal(count, hidden, width)
        self.shared = self._normal(shared, hidden), self._normal(hidden, shared)

    def changes(self, rows: int) -> Iterator[Change]:
        """A block's 16 tokens a row, and single tokens."""
        for tokens in dict.fromkeys((BLOCK * rows, rows)):
            work = self._work(tokens)
            kernel = f"experts of {tokens} tokens"
            yield Change(kernel, rows, "-", experts_triton, {}, work)
            for tiling in tilings(tokens):
                values = {"tiling_of": lambda *_, tiling=tiling: tiling}
                name = " ".join(f"{field}={value}" for field, value in asdict(tiling).items())
                yield Change(kernel, rows, name, experts_triton, values, work)

    def _work(self, tokens: int) -> Callable[[], Tensor]:
        config, picks = self.config, self.config.num_experts_per_tok
        # A block of text reads 34 of 128 experts, as 6.5 independent tokens would.
        used = math.ceil(expected_unique(config, max(1.0, tokens * 6.5 / BLOCK)))
        chosen = torch.randperm(config.n_routed_experts)[: max(picks, used)]
        scattered = torch.rand(tokens, len(chosen)).argsort(dim=1)[:, :picks]
        ids = chosen[scattered].to(self.device)
        scores = torch.full(ids.shape, 1.0 / picks, device=self.device)
        x = self._normal(tokens, config.hidden_size)

        def work() -> Tensor:
            out: Tensor = experts_triton.experts(x, ids, scores, self.up, self.down, *self.shared)
            return out

        return work

    def _normal(self, *shape: int) -> Tensor:
        out = torch.empty(shape, device=self.device, dtype=self.dtype)
        return out.normal_(0.0, shape[-1] ** -0.5)


class _Mixers:
    """Scans, replay and attention of one layer over rows of 4 K context."""

    def __init__(self, preset: str, device: torch.device) -> None:
        config = replace(PRESETS[preset], layer_pattern="M*", vocab_size=256)
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        maker = TowerMaker(config, device, self.dtype, generator)
        mamba = maker.context().weights.layers[0].mixer
        assert isinstance(mamba, MambaWeights)
        self.mamba = mamba
        self.replay = maker.context().replay_weights

    def changes(self, rows: int) -> Iterator[Change]:
        pages = rows * pages_for(_CONTEXT + BLOCK)
        pool = FilledPool(self.config, rows, pages, self.device, self.dtype)
        pool.context = _CONTEXT
        states = [pool.open(_CONTEXT + BLOCK) for _ in range(rows)]
        for length in (1, BLOCK):
            batch = rows_of(states, [length] * rows, [_CONTEXT] * rows)
            yield from self._scans(pool, batch, rows, length)
            yield from self._replays(pool, batch, rows, length)
            yield from self._attentions(pool, batch, rows, length)

    def _scans(self, pool: FilledPool, batch: Rows, rows: int, length: int) -> Iterator[Change]:
        config = self.config
        width = config.d_inner + config.conv_dim + config.mamba_num_heads
        projected = torch.randn(rows * length, width, device=self.device).to(self.dtype)
        weights = scan_weights(self.mamba, config)

        def work() -> Tensor:
            conv, ssm = pool.conv[:, 0], pool.ssm[:, 0]
            out: Tensor = mamba_scan_triton.mamba_scan(projected, weights, conv, ssm, batch)
            return out

        kernel = f"scan of {length}"
        yield Change(kernel, rows, "-", mamba_scan_triton, {}, work)
        for channels, warps in product((16, 32, 64), (1, 2, 4, 8)):
            name = f"channels={channels} warps={warps}"
            values: dict[str, Any] = {"TOKEN_CHANNELS": channels, "TOKEN_WARPS": warps}
            if length > 1:
                tile = Tile(16, channels, True, warps, 1)
                values = {"tile_of": lambda _, tile=tile: tile}
            yield Change(kernel, rows, name, mamba_scan_triton, values, work)

    def _replays(self, pool: FilledPool, batch: Rows, rows: int, length: int) -> Iterator[Change]:
        config, total = self.config, rows * length
        xbc = torch.randn(1, total, config.conv_dim, device=self.device).to(self.dtype)
        dt = torch.randn(1, total, config.mamba_num_heads, device=self.device).to(self.dtype)
        counts = torch.full((rows,), length, dtype=torch.int32, device=self.device)

        def work() -> None:
            assert self.replay is not None
            replay_triton.replay(pool.ssm, pool.conv, xbc, dt, self.replay, batch, counts)

        kernel = f"replay of {length}"
        yield Change(kernel, rows, "-", replay_triton, {}, work)
        for channels, warps in product((8, 16, 32, 64), (1, 2, 4, 8)):
            values = {"SLICE": channels, "WARPS": warps}
            name = f"channels={channels} warps={warps}"
            yield Change(kernel, rows, name, replay_triton, values, work)

    def _attentions(
        self, pool: FilledPool, batch: Rows, rows: int, length: int
    ) -> Iterator[Change]:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = (rows * length, heads + 2 * kv_heads, config.head_dim)
        qkv = torch.randn(shape, device=self.device).to(self.dtype)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)

        def work() -> Tensor:
            out: Tensor = attention_triton.attention(q, k, v, pool.layer_kv(0), batch, length == 1)
            return out

        kernel = f"attention of {length}"
        yield Change(kernel, rows, "-", attention_triton, {}, work)
        folded = (16,) if length == 1 else (64, 128)
        for tile, keys, warps, stages in product(folded, (64, 128), (4, 8), (2, 3)):
            for longer in (1, 2, 4, 8):
                tiling = replace(
                    attention_triton.tiling_for(self.dtype, folded[0]),
                    rows=tile,
                    keys=keys,
                    warps=warps,
                    stages=stages,
                )
                values = {
                    "tiling_for": lambda *_, tiling=tiling: tiling,
                    "longer_splits": lambda _, longer=longer: longer,
                }
                name = f"rows={tile} keys={keys} warps={warps} stages={stages} longer={longer}"
                yield Change(kernel, rows, name, attention_triton, values, work)


EXPERTS, MIXERS = _Experts, _Mixers


if __name__ == "__main__":
    main()
