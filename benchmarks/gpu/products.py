"""Single launches at the 30B model's shapes: `python -m benchmarks.gpu.products --out FILE`.

Dense products by the library, by our own kernel as few or many rows would have it, and by that in
deterministic mode; the router's product in fp64 and in other forms, and the experts' kernels at
several numbers of unique experts, with experts in 8 bits multiplied in both ways, each beside the
least time of its bytes and operations. Weights go round several copies, so that none is found in
the cache. `row_alone` says of a dense product whether its first row has the bits that it has alone.
On a CPU one product stands for all.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.bench.timing import launch_seconds, measure_ceilings
from twotower.kernels import dispatch
from twotower.kernels.determinism import deterministic
from twotower.kernels.launch_table import LaunchTable, using
from twotower.kernels.linear_choice import entry_name
from twotower.kernels.moe import ExpertWeights, RouterRule, Routing, narrow_parts
from twotower.kernels.quantized import EXPERT_PRODUCTS, ExpertProducts, quantize
from twotower.planner.floors import Ceilings
from twotower.planner.shapes import PRESETS
from twotower.towers.config.model_config import TwoTowerConfig

Entry = dict[str, Any]
# More than the last-level cache of any card.
_BEYOND_CACHE = 256 << 20
_PIECES = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="30b", choices=list(PRESETS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 64, 256, 1024])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    bench = _Products(PRESETS[args.preset], device)
    lines: list[Entry] = []
    for entry in bench.entries(args.tokens):
        lines.append(entry)
        print(json.dumps(entry), flush=True)
        args.out.write_text(json.dumps({"products": lines}, indent=1), encoding="utf-8")


class _Products:
    """Launches of one model's shapes on one device, in bf16 on a GPU."""

    def __init__(self, config: TwoTowerConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.ceilings: Ceilings = measure_ceilings(device, self.dtype)

    def entries(self, tokens: Sequence[int]) -> Iterator[Entry]:
        """Every measurement, the most telling first."""
        for count in tokens:
            yield from self._router(count)
        for count in tokens:
            yield from self._all_experts(count)
        for count in tokens:
            yield from self._dense(count)

    def _dense(self, tokens: int) -> Iterator[Entry]:
        config = self.config
        hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
        keys = 2 * config.num_key_value_heads * config.head_dim
        projected = config.d_inner + config.conv_dim + config.mamba_num_heads
        shapes = {
            "in_proj": (projected, hidden),
            "out_proj": (hidden, config.d_inner),
            "qkv": (queries + keys, hidden),
            "o_proj": (hidden, queries),
            "head": (config.vocab_size, hidden),
        }
        for name, (outputs, inputs) in shapes.items():
            x = self._normal(tokens, inputs)
            weights = self._copies(outputs, inputs)
            moved = (outputs * inputs + tokens * (inputs + outputs)) * self.dtype.itemsize
            flops = 2.0 * tokens * outputs * inputs
            for own, product in _PRODUCTS.items():
                work = _over(weights, lambda weight, x=x, product=product: product(x, weight))
                least = flops / self.ceilings.matmul_flops
                entry = self._entry(f"{name}{own}", tokens, work, moved, least)
                alone = torch.equal(product(x, weights[0])[:1], product(x[:1], weights[0]))
                yield {**entry, "row_alone": alone}

    def _router(self, tokens: int) -> Iterator[Entry]:
        """The choice's product in fp64, and as fp32 sums of pieces added in fp64."""
        experts, hidden = self.config.n_routed_experts, self.config.hidden_size
        x = self._normal(tokens, hidden)
        wide = torch.randn(experts, hidden, device=self.device, dtype=torch.float64)
        narrow = wide.to(self.dtype)
        pieces = next(count for count in range(_PIECES, 0, -1) if hidden % count == 0)
        folded = wide.float().view(experts, pieces, -1).permute(1, 2, 0).contiguous()
        moved = experts * hidden * 8 + tokens * (hidden * 2 + experts * 8)
        seconds = 2.0 * tokens * experts * hidden / self.ceilings.wide_flops

        def fp64() -> Tensor:
            return torch.mm(x.double(), wide.T)

        def split() -> Tensor:
            parts = x.float().view(tokens, pieces, -1).transpose(0, 1)
            return torch.bmm(parts, folded).double().sum(0)

        def half() -> Tensor:
            return torch.mm(x, narrow.T)

        for name, work in (("router fp64", fp64), ("router fp32 pieces", split)):
            yield self._entry(name, tokens, work, moved, seconds)
        yield self._entry("router bf16", tokens, half, moved / 4, 0.0)
        bias = torch.zeros(experts, device=self.device)
        # As in a tower: fp64 values from bf16, and the parts that tensor cores multiply.
        gate = self._normal(experts, hidden).double()
        parts = narrow_parts(gate) if self.device.type == "cuda" else None
        rule = RouterRule(self.config.num_experts_per_tok, 1, 1, True, 2.5)

        def route() -> Tensor:
            ids: Tensor = dispatch.route(x, gate, bias, rule, None, parts).ids
            return ids

        yield self._entry("route", tokens, route, moved / 4, 0.0)

    def _all_experts(self, tokens: int) -> Iterator[Entry]:
        """Experts in the model's dtype, then in 8 bits."""
        count, hidden = self.config.n_routed_experts, self.config.hidden_size
        width = self.config.moe_intermediate_size
        up, down = self._normal(count, width, hidden), self._normal(count, hidden, width)
        yield from self._experts("experts", tokens, up, down)
        for products in EXPERT_PRODUCTS:
            narrow = quantize(up, products), quantize(down, products)
            yield from self._experts(f"experts in 8 bits, {products}", tokens, *narrow, products)

    def _experts(
        self,
        name: str,
        tokens: int,
        up: ExpertWeights,
        down: ExpertWeights,
        products: ExpertProducts | None = None,
    ) -> Iterator[Entry]:
        """One way of multiplying, `products` None for experts that are not in 8 bits."""
        config, hidden = self.config, self.config.hidden_size
        count, picks = config.n_routed_experts, config.num_experts_per_tok
        width, shared = config.moe_intermediate_size, config.moe_shared_expert_intermediate_size
        shared_up, shared_down = self._normal(shared, hidden), self._normal(hidden, shared)
        x = self._normal(tokens, hidden)
        scores = torch.full((tokens, picks), 1.0 / picks, device=self.device)
        most = min(count, tokens * picks)
        for wanted in sorted({min(count, most) for count in (6, 34, 69, 127, 128)}):
            ids = self._ids(tokens, picks, wanted)
            used = int(ids.unique().numel())
            moved = 2 * hidden * shared * self.dtype.itemsize
            moved += 2 * hidden * used * width * (1 if products else self.dtype.itemsize)
            moved += 2 * tokens * (hidden + picks * (hidden + 2 * width)) * self.dtype.itemsize
            rates = self.ceilings
            rate = rates.narrow_flops if products == "fp8" else rates.matmul_flops
            seconds = 4.0 * tokens * hidden * picks * width / rate
            seconds += 4.0 * tokens * hidden * shared / rates.matmul_flops

            def work(ids: Tensor = ids) -> object:
                routing = Routing(ids, scores)
                return dispatch.slot_outputs(x, routing, up, down, shared_up, shared_down)

            yield {**self._entry(name, tokens, work, moved, seconds), "unique": used}

    def _ids(self, tokens: int, picks: int, wanted: int) -> Tensor:
        """Different experts for each token, `wanted` of them in all, spread over all experts."""
        generator = torch.Generator().manual_seed(wanted)
        chosen = torch.randperm(self.config.n_routed_experts, generator=generator)[:wanted]
        order = torch.arange(tokens * picks).view(tokens, picks) % max(wanted, picks)
        return chosen[order % wanted].to(self.device)

    def _normal(self, *shape: int) -> Tensor:
        scale = shape[-1] ** -0.5
        out = torch.empty(shape, device=self.device, dtype=self.dtype)
        return out.normal_(0.0, scale)

    def _copies(self, outputs: int, inputs: int) -> list[Tensor]:
        size = outputs * inputs * self.dtype.itemsize
        count = 1 + _BEYOND_CACHE // size if self.device.type == "cuda" else 1
        return [self._normal(outputs, inputs) for _ in range(min(count, 16))]

    def _entry(
        self, name: str, tokens: int, work: Callable[[], object], moved: float, seconds: float
    ) -> Entry:
        floor = max(moved / self.ceilings.bytes_per_s, seconds)
        spent = launch_seconds(work, self.device)
        return {
            "name": name,
            "tokens": tokens,
            "us": round(1e6 * spent, 2),
            "floor_us": round(1e6 * floor, 2),
            "share_of_floor": round(floor / spent, 3),
        }


def _own(x: Tensor, weight: Tensor) -> Tensor:
    with using(LaunchTable("", {entry_name(*weight.shape): [{"own": True}]})):
        out: Tensor = dispatch.linear(x, weight)
    return out


def _steady(x: Tensor, weight: Tensor) -> Tensor:
    with deterministic():
        out: Tensor = dispatch.linear(x, weight)
    return out


# By what follows the weight's name in a table.
_PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "": F.linear,
    ", own": _own,
    ", own, deterministic": _steady,
}


def _over(weights: Sequence[Tensor], product: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    turn = cycle(weights)
    return lambda: product(next(turn))


if __name__ == "__main__":
    main()
