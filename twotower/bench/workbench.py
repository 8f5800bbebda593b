"""Shared by all measurements: both towers, the pool, the engines, and floors of passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower.bench.decode import SPARE, EnginePair
from twotower.bench.filled import FilledPool, pages_of_rows
from twotower.bench.options import BenchOptions
from twotower.bench.probes import measured_unique
from twotower.bench.random_towers import TowerMaker
from twotower.bench.routing import steer, steer_to, wanted_unique
from twotower.bench.timing import measure_ceilings
from twotower.planner.floors import (
    Ceilings,
    PassKind,
    Work,
    floor_seconds,
    num_bytes,
    pass_works,
    shape_of,
)
from twotower.planner.schedules import PROFILES
from twotower.planner.shapes import PRESETS
from twotower.towers.checkpoint.weights import parse_dtype, parse_expert_products
from twotower.towers.model.backbone import Tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower

WARM_BLOCKS = 2
# If at most this many experts would be barred, the routing is left alone.
_NEARLY_ALL = 1.5


@dataclass(frozen=True)
class PassFloor:
    """The least time of a pass in seconds, the bytes that it must move, the experts per layer that
    it reads, and its operators."""

    seconds: float
    num_bytes: float
    unique: float
    works: tuple[Work, ...]


def device_ceilings(options: BenchOptions) -> Ceilings:
    """Measures the ceilings of the benchmark's device, and frees the memory that this took."""
    device = torch.device(options.device)
    ceilings = measure_ceilings(device, parse_dtype(options.dtype))
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return ceilings


class Workbench:
    """Both towers on one device, with a pool that is large enough for all measurements."""

    def __init__(self, options: BenchOptions, ceilings: Ceilings | None = None) -> None:
        self.options = options
        self.config = PRESETS[options.preset]
        self.device = torch.device(options.device)
        self.dtype = parse_dtype(options.dtype)
        # Measured before the towers take the memory.
        self.ceilings = ceilings or device_ceilings(options)
        # States are drawn from the default generator.
        torch.manual_seed(options.seed)
        generator = torch.Generator(self.device).manual_seed(options.seed)
        maker = TowerMaker(
            self.config,
            self.device,
            self.dtype,
            generator,
            options.experts,
            expert_products=parse_expert_products(options.expert_products),
            deterministic=options.deterministic,
        )
        self.context: ContextTower = maker.context()
        self.denoiser: DenoiserTower = maker.denoiser()
        self.pool = self._pool()
        most_rows = max(*options.batches, options.long_rows)
        self.pair = EnginePair(self.context, self.denoiser, self.pool, most_rows * options.block)
        self._unique: dict[tuple[PassKind, int], float] = {}
        self.open_experts = self.config.n_routed_experts

    def tower(self, kind: PassKind) -> Tower:
        """The tower that runs passes of a kind."""
        return self.denoiser if kind == "denoise" else self.context

    def steer(self, rows: int) -> None:
        """Narrows the denoiser's routing for passes over so many rows, as if the block of a single
        row read `options.unique` experts per layer."""
        options, every = self.options, self.config.n_routed_experts
        for key in [key for key in self._unique if key[0] == "denoise"]:
            del self._unique[key]
        self.open_experts = every
        steer(self.denoiser, every)
        if not options.unique or not self.config.layer_pattern.count("E"):
            return
        wanted = wanted_unique(self.config, options.unique, rows)
        if wanted < every - _NEARLY_ALL:
            self.open_experts, measured = steer_to(
                self.denoiser, self.pool, rows, options.block, wanted
            )
            self._unique["denoise", rows] = measured

    def unique(self, kind: PassKind, rows: int) -> float:
        """Experts per layer that a pass over so many rows reads: measured for powers of two and for
        the batches of the options, interpolated for other numbers."""
        known = self._unique.get((kind, rows))
        if known is not None:
            return known
        below = 1 << (rows.bit_length() - 1)
        if rows in (below, *self.options.batches):
            tower, block = self.tower(kind), self.options.block
            measured = measured_unique(kind, tower, self.pool, rows, block)
            return self._unique.setdefault((kind, rows), measured)
        low, high = self.unique(kind, below), self.unique(kind, 2 * below)
        return low + (high - low) * (rows - below) / below

    def floor(
        self, kind: PassKind, rows: int, context: int | None = None, masked: float = 1.0
    ) -> PassFloor:
        """The floor of a pass over `rows` rows of `context` tokens (None: that of the options);
        `masked` is the share of a denoiser's positions that goes through the head."""
        unique = self.unique(kind, rows)
        size = self.dtype.itemsize
        shape = shape_of(
            kind,
            self.config,
            rows,
            context or self.options.context,
            self.options.block,
            unique=unique,
            masked=masked,
            value_bytes=size,
            expert_bytes=1 if self.options.experts == "fp8" else size,
            fp8_products=self.options.expert_products == "fp8",
        )
        works = pass_works(self.config, shape)
        return PassFloor(
            floor_seconds(works, self.ceilings), num_bytes(works), unique, tuple(works)
        )

    def close(self) -> None:
        """Ends the engines' event loop."""
        self.pair.close()

    def _pool(self) -> FilledPool:
        options = self.options
        longest = max(len(PROFILES[name]) for name in ("headline", *options.profiles))
        room = SPARE * (WARM_BLOCKS + options.rounds * longest) * options.block
        rows = max(*options.batches, options.long_rows)
        pages = max(
            pages_of_rows(max(options.batches), options.context + room),
            pages_of_rows(options.long_rows, options.long_context + room),
        )
        return FilledPool(self.config, rows, pages, self.device, self.dtype)
