"""Tilings of the experts' products by time: `python -m benchmarks.gpu.tune --tokens 16 --out FILE`.

Tries each tiling on both products of one layer of the 30B model, as the kernels' own table would
launch it. With `--compile` every launch is made once and nothing is timed, so that several processes
can fill the cache of compiled kernels before one of them measures.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.gpu.products import launch_seconds
from twotower.bench.floors import expected_unique
from twotower.bench.shapes import PRESETS
from twotower.kernels import experts_triton
from twotower.kernels.experts_triton import Tiling

Entry = dict[str, Any]
# Rows of a tile by tokens of the pass: most experts' rows should fit into one.
_ROWS = ((64, (16,)), (128, (16,)), (320, (16, 32)), (768, (32, 64)), (1536, (64, 128)))
_MOST_SHARED = 200_000


def tilings(tokens: int) -> Iterator[Tiling]:
    """What is worth trying for so many tokens, in bf16."""
    rows = next((own for most, own in _ROWS if tokens <= most), (128,))
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
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 256, 1024])
    parser.add_argument("--part", type=int, nargs=2, default=[0, 1], help="this share of all")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    layer = _Layer(args.preset, device)
    lines: list[Entry] = []
    for tokens in args.tokens:
        own = list(tilings(tokens))[args.part[0] :: args.part[1]]
        for tiling in own[: None if device.type == "cuda" else 2]:
            with patch.object(experts_triton, "tiling_of", lambda *_, t=tiling: t):
                try:
                    entry = layer.entry(tokens, tiling, timed=not args.compile)
                except Exception as error:  # a tiling that does not fit the device is a finding
                    entry = {"tokens": tokens, **asdict(tiling), "error": type(error).__name__}
            lines.append(entry)
        best = sorted((own for own in lines if own.get("us")), key=lambda own: own["us"])
        for line in [own for own in best if own["tokens"] == tokens][:6]:
            print(json.dumps(line), flush=True)
        args.out.write_text(json.dumps({"products": lines}, indent=1), encoding="utf-8")


class _Layer:
    """Experts of one layer, and tokens that choose as many of them as text does."""

    def __init__(self, preset: str, device: torch.device) -> None:
        self.config, self.device = PRESETS[preset], device
        config = self.config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shared, count = config.moe_shared_expert_intermediate_size, config.n_routed_experts
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.up, self.down = self._normal(count, width, hidden), self._normal(count, hidden, width)
        self.shared = self._normal(shared, hidden), self._normal(hidden, shared)

    def entry(self, tokens: int, tiling: Tiling, *, timed: bool) -> Entry:
        config, picks = self.config, self.config.num_experts_per_tok
        # Text of one block reads 34 of 128 experts, as 6.5 of its 16 tokens' would alone.
        used = math.ceil(expected_unique(config, max(1.0, tokens * 6.5 / 16)))
        chosen = torch.randperm(config.n_routed_experts)[: max(picks, used)]
        scattered = torch.rand(tokens, len(chosen)).argsort(dim=1)[:, :picks]
        ids = chosen[scattered].to(self.device)
        scores = torch.full(ids.shape, 1.0 / picks, device=self.device)
        x = self._normal(tokens, config.hidden_size)

        def work() -> Tensor:
            out: Tensor = experts_triton.experts(x, ids, scores, self.up, self.down, *self.shared)
            return out

        found = {"tokens": tokens, "used": len(chosen), **asdict(tiling)}
        if not timed or self.device.type != "cuda":
            if self.device.type == "cuda":
                work()
            return found
        return {**found, "us": round(1e6 * launch_seconds(work, self.device), 1)}

    def _normal(self, *shape: int) -> Tensor:
        out = torch.empty(shape, device=self.device, dtype=self.dtype)
        return out.normal_(0.0, shape[-1] ** -0.5)


if __name__ == "__main__":
    main()
