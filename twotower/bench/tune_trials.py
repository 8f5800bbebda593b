"""Launches of kernels to try, each on one layer of a model: experts, scans, replay and attention.

A trial is an entry of a launch table and the work that it would launch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import cycle, product
from typing import Protocol

import torch
from torch import Tensor

from twotower.bench.filled import FilledPool
from twotower.bench.random_towers import TowerMaker
from twotower.kernels import (
    attention_triton,
    dispatch,
    experts_triton,
    mamba_scan_triton,
    replay_triton,
)
from twotower.kernels.experts_triton import Tiling
from twotower.kernels.launch_table import Entry
from twotower.kernels.linear_choice import entry_name
from twotower.kernels.moe import ExpertWeights
from twotower.kernels.quantized import quantize
from twotower.kernels.rows import Rows
from twotower.kernels.unmask import SamplingBatch
from twotower.planner.floors import expected_unique
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import PRESETS
from twotower.towers.model.backbone import MixerInputs, scan_weights
from twotower.towers.model.weights import MambaWeights
from twotower.towers.state.context_state import ContextState, rows_of
from twotower.towers.state.pages import pages_for

# Rows of a tile by tokens of the pass: the rows of most experts should fit into a tile.
_ROWS = ((64, (16,)), (128, (16,)), (320, (16, 32)), (768, (32, 64)), (1536, (64, 128)))
_MOST_SHARED = 200_000
_CONTEXT = 4096
_MOST_CACHED = 128 << 20
# Tokens of a row's piece of a prompt.
_PIECES = (256, 1024)
# Rows of the passes that prove a launch.
_PROVED = 4


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


@dataclass(frozen=True)
class Trial:
    """An entry of a kernel's table for passes of `size`, empty for the present launch, and work
    that launches the kernel at that size. An `exact` one changes no arithmetic. `proof` gives what
    is compared, where that is more than the work."""

    kernel: str
    size: int
    entry: Entry
    work: Callable[[], object]
    exact: bool = False
    proof: Callable[[], object] | None = None

    @property
    def compared(self) -> Callable[[], object]:
        """What gives the numbers by which a launch is judged."""
        return self.proof or self.work


class Maker(Protocol):
    """Makes the trials of some kernels on one device."""

    def __init__(self, preset: str, device: torch.device) -> None: ...

    def trials(self, rows: int) -> Iterator[Trial]:
        """Trials at so many rows, those of one kernel and size one after another."""


class Passes:
    """Passes of a few layers of all kinds, for what concerns how launches follow one another."""

    def __init__(self, preset: str, device: torch.device) -> None:
        config = replace(PRESETS[preset], layer_pattern="MEM*E", vocab_size=256)
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        generator = torch.Generator(device).manual_seed(0)
        maker = TowerMaker(config, device, self.dtype, generator)
        self.tower, self.denoiser = maker.context(), maker.denoiser()

    def trials(self, rows: int) -> Iterator[Trial]:
        """Kernels that are on their way before the last has ended, and not: one choice for passes
        of all sizes, timed at one row, where a pass is nothing but launches, and proved by passes
        of all kinds."""
        if rows > 1:
            return
        room = _PIECES[0]
        pool = FilledPool(
            self.config, _PROVED, _PROVED * pages_for(_CONTEXT + room), self.device, self.dtype
        )
        pool.context = _CONTEXT
        states = [pool.open(_CONTEXT + room) for _ in range(_PROVED)]
        step = self._pass(pool, states[:1], 1)
        passes = [
            step,
            self._pass(pool, states, 1),
            self._pass(pool, states, BLOCK),
            self._pass(pool, states[:1], room),
            self._denoise(pool, states),
        ]
        before = pool.conv.clone(), pool.ssm.clone()

        def proof() -> Tensor:
            pool.conv.copy_(before[0])
            pool.ssm.copy_(before[1])
            return torch.cat([own() for own in passes])

        for entry in ({}, {"programmatic": True}):
            yield Trial("overlap", rows, entry, step, exact=True, proof=proof)

    def _pass(
        self, pool: FilledPool, states: list[ContextState], length: int
    ) -> Callable[[], Tensor]:
        """Reads so many tokens of each row, moves its state over them and draws after each."""
        rows = rows_of(states, [length] * len(states), [_CONTEXT] * len(states))
        total = length * len(states)
        log = self.tower.new_log(total, whole=True)
        counts = torch.full_like(rows.slots, length)
        tokens = torch.arange(total, device=self.device) % self.config.vocab_size

        @torch.inference_mode()
        def work() -> Tensor:
            hidden = self.tower.run(tokens, MixerInputs(rows, pool, causal=True), log)
            if log is not None and self.tower.replay_weights is not None:
                log.replay(pool, self.tower.replay_weights, rows, counts)
            return self._drawn(hidden)

        return work

    def _denoise(self, pool: FilledPool, states: list[ContextState]) -> Callable[[], Tensor]:
        rows = rows_of(states, [BLOCK] * len(states), [_CONTEXT] * len(states))
        total = BLOCK * len(states)
        index = torch.zeros(total, dtype=torch.int64, device=self.device)
        tokens = torch.arange(total, device=self.device) % self.config.vocab_size
        table = self.denoiser.modulation(0.5).unsqueeze(0)

        @torch.inference_mode()
        def work() -> Tensor:
            inputs = MixerInputs(rows, pool, causal=False)
            return self._drawn(self.denoiser.run(tokens, table, index, inputs))

        return work

    def _drawn(self, hidden: Tensor) -> Tensor:
        """The hidden states beside the tokens that are drawn after them and their likelihoods."""
        none = torch.zeros(len(hidden), dtype=torch.int64, device=self.device)
        batch = SamplingBatch(none.float(), none, none, none, none, none - 1, none - 1)
        ids, _, log_probs, _ = dispatch.predict(self.tower.logits(hidden), batch)
        beside = (ids.to(hidden.dtype).unsqueeze(1), log_probs.to(hidden.dtype).unsqueeze(1))
        return torch.cat([hidden, *beside], dim=1)


class Products:
    """The narrow dense weights of a layer, by the library and by our own kernel."""

    def __init__(self, preset: str, device: torch.device) -> None:
        config = PRESETS[preset]
        queries = config.num_attention_heads * config.head_dim
        keys = 2 * config.num_key_value_heads * config.head_dim
        hidden = config.hidden_size
        shapes = [(hidden, config.d_inner), (queries + keys, hidden), (hidden, queries)]
        self.shapes, self.device = list(dict.fromkeys(shapes)), device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def trials(self, rows: int) -> Iterator[Trial]:
        """Single tokens, and a block's."""
        for outputs, inner in self.shapes:
            weights = cycle(self._copies(outputs, inner))
            for tokens in dict.fromkeys((rows, BLOCK * rows)):
                x = torch.randn(tokens, inner, device=self.device).to(self.dtype)

                def work(x: Tensor = x, weights: Iterator[Tensor] = weights) -> Tensor:
                    out: Tensor = dispatch.linear(x, next(weights))
                    return out

                for entry in ({}, {"own": True}):
                    yield Trial(entry_name(outputs, inner), tokens, entry, work)

    def _copies(self, outputs: int, inner: int) -> list[Tensor]:
        """The same weight at as many places as a card's cache cannot hold."""
        count = _MOST_CACHED // (2 * outputs * inner) + 1 if self.device.type == "cuda" else 1
        weight = torch.randn(outputs, inner, device=self.device).mul(inner**-0.5).to(self.dtype)
        return [weight.clone() for _ in range(count)]


class Experts:
    """Experts of one layer, and tokens that choose as many of them as text does."""

    kernel = "experts"
    # A tile's inner length against that of 16-bit weights.
    longer = 1

    def __init__(self, preset: str, device: torch.device) -> None:
        self.config, self.device = PRESETS[preset], device
        config = self.config
        hidden, width = config.hidden_size, config.moe_intermediate_size
        shared, count = config.moe_shared_expert_intermediate_size, config.n_routed_experts
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.up, self.down = self._normal(count, width, hidden), self._normal(count, hidden, width)
        self.shared = self._normal(shared, hidden), self._normal(hidden, shared)

    def trials(self, rows: int) -> Iterator[Trial]:
        """A block's 16 tokens a row, and single tokens."""
        for tokens in dict.fromkeys((rows, BLOCK * rows)):
            work = self._work(tokens)
            yield Trial(self.kernel, tokens, {}, work)
            for tiling in tilings(tokens):
                entry = {**asdict(tiling), "inner": self.longer * tiling.inner}
                yield Trial(self.kernel, tokens, entry, work)

    def _work(self, tokens: int) -> Callable[[], Tensor]:
        config, picks = self.config, self.config.num_experts_per_tok
        # A block of text reads 34 of 128 experts, as 6.5 independent tokens would.
        used = math.ceil(expected_unique(config, max(1.0, tokens * 6.5 / BLOCK)))
        chosen = torch.randperm(config.n_routed_experts)[: max(picks, used)]
        scattered = torch.rand(tokens, len(chosen)).argsort(dim=1)[:, :picks]
        ids = chosen[scattered].to(self.device)
        scores = torch.full(ids.shape, 1.0 / picks, device=self.device)
        x = self._normal(tokens, config.hidden_size)

        up, down = self._weights()

        def work() -> Tensor:
            out: Tensor = experts_triton.experts(x, ids, scores, up, down, *self.shared)
            return out

        return work

    def _weights(self) -> tuple[ExpertWeights, ExpertWeights]:
        """Up and down, as the kernel multiplies them."""
        return self.up, self.down

    def _normal(self, *shape: int) -> Tensor:
        out = torch.empty(shape, device=self.device, dtype=self.dtype)
        return out.normal_(0.0, shape[-1] ** -0.5)


class NarrowExperts(Experts):
    """The same in 8 bits, with tokens in 8 bits too."""

    kernel = "experts_fp8"
    longer = 2

    def _weights(self) -> tuple[ExpertWeights, ExpertWeights]:
        return self._narrow

    @cached_property
    def _narrow(self) -> tuple[ExpertWeights, ExpertWeights]:
        return quantize(self.up, "fp8"), quantize(self.down, "fp8")


class Mixers:
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

    def trials(self, rows: int) -> Iterator[Trial]:
        """Rows of a single token, and of a block."""
        pages = rows * pages_for(_CONTEXT + BLOCK)
        pool = FilledPool(self.config, rows, pages, self.device, self.dtype)
        pool.context = _CONTEXT
        states = [pool.open(_CONTEXT + BLOCK) for _ in range(rows)]
        for length in (1, BLOCK):
            batch = rows_of(states, [length] * rows, [_CONTEXT] * rows)
            yield from self._scans(pool, batch, rows, length)
            yield from self._replays(pool, batch, rows, length)
            yield from self._attentions(pool, batch, rows, length)
        if rows == 1:
            yield from self._pieces()

    def _scans(self, pool: FilledPool, batch: Rows, rows: int, length: int) -> Iterator[Trial]:
        work = self._scan(pool, batch, rows * length)
        kernel = "scan_token" if length == 1 else "scan_block"
        yield Trial(kernel, rows, {}, work)
        for channels, warps in product((16, 32, 64), (1, 2, 4, 8)):
            yield Trial(kernel, rows, {"channels": channels, "num_warps": warps}, work)

    def _scan(self, pool: FilledPool, batch: Rows, tokens: int) -> Callable[[], Tensor]:
        config = self.config
        width = config.d_inner + config.conv_dim + config.mamba_num_heads
        projected = torch.randn(tokens, width, device=self.device).to(self.dtype)
        weights = scan_weights(self.mamba, config)

        def work() -> Tensor:
            conv, ssm = pool.conv[:, 0], pool.ssm[:, 0]
            out: Tensor = mamba_scan_triton.mamba_scan(projected, weights, conv, ssm, batch)
            return out

        return work

    def _pieces(self) -> Iterator[Trial]:
        """The scan of a long piece of one row, by chunks side by side and by a walk."""
        for tokens in _PIECES:
            pool = FilledPool(self.config, 1, pages_for(tokens), self.device, self.dtype)
            batch = rows_of([pool.open(tokens)], [tokens], [0])
            work = self._scan(pool, batch, tokens)
            yield Trial("scan_piece", tokens, {}, work)
            yield Trial("scan_piece", tokens, {"least_tokens": 2 * _PIECES[-1]}, work)
            for channels, warps in product((32, 64), (4, 8)):
                sides = {"state_channels": channels, "output_channels": channels}
                entry = {**sides, "state_warps": warps, "output_warps": warps}
                yield Trial("scan_piece", tokens, entry, work)

    def _replays(self, pool: FilledPool, batch: Rows, rows: int, length: int) -> Iterator[Trial]:
        config, total = self.config, rows * length
        xbc = torch.randn(1, total, config.conv_dim, device=self.device).to(self.dtype)
        dt = torch.randn(1, total, config.mamba_num_heads, device=self.device).to(self.dtype)
        counts = torch.full((rows,), length, dtype=torch.int32, device=self.device)

        def work() -> None:
            assert self.replay is not None
            replay_triton.replay(pool.ssm, pool.conv, xbc, dt, self.replay, batch, counts)

        kernel = "replay_token" if length == 1 else "replay_block"
        yield Trial(kernel, rows, {}, work)
        for channels, warps in product((8, 16, 32, 64), (1, 2, 4, 8)):
            yield Trial(kernel, rows, {"channels": channels, "num_warps": warps}, work)

    def _attentions(self, pool: FilledPool, batch: Rows, rows: int, length: int) -> Iterator[Trial]:
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        shape = (rows * length, heads + 2 * kv_heads, config.head_dim)
        qkv = torch.randn(shape, device=self.device).to(self.dtype)
        q, k, v = qkv.split((heads, kv_heads, kv_heads), dim=1)

        def work() -> Tensor:
            out: Tensor = attention_triton.attention(q, k, v, pool.layer_kv(0), batch, length == 1)
            return out

        kernel = "attention_token" if length == 1 else "attention_block"
        yield Trial(kernel, rows, {}, work)
        folded = (16,) if length == 1 else (64, 128)
        splits = (256, 512, 1024, 2048, 4096)
        for tile, keys, warps, stages in product(folded, (64, 128), (4, 8), (2, 3)):
            for tokens in splits[length > 1 :]:
                entry = {"rows": tile, "keys": keys, "warps": warps, "stages": stages}
                yield Trial(kernel, rows, {**entry, "split_tokens": tokens}, work)
