"""Options of a benchmark run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower.bench.random_towers import EXPERT_FORMATS
from twotower.kernels.quantized import EXPERT_PRODUCTS
from twotower.planner.schedules import BLOCK, PROFILES
from twotower.planner.shapes import PRESETS
from twotower.towers.checkpoint.weights import DTYPES

# The sections of a report for which there are steps, the most important first.
SECTIONS = (
    "speed",
    "baseline",
    "operators",
    "continuous",
    "attention",
    "scans",
    "profiles",
    "verified",
    "invariance",
)
# Rows and tokens are counted in int32.
_MOST = 2**31 - 1


@dataclass(frozen=True)
class BenchOptions:
    """Measurements and their sizes. Raises ValueError for values out of range.

    `expert_products` is how experts in the format "fp8" are multiplied.
    `batches` are numbers of rows, `context` and `long_context` tokens of each row. `unique` is the
    number of experts per layer that the block of one row should read, 0 for the routing as the
    weights give it. Towers that are `deterministic` give a row the same bits in any batch. A run
    goes through its profile `rounds` times. Steps that would begin after `minutes` are left out.
    """

    preset: str = "tiny"
    device: str = "cpu"
    dtype: str = "float32"
    experts: str = "full"
    expert_products: str = "widened"
    unique: float = 0.0
    batches: tuple[int, ...] = (1, 4)
    context: int = 128
    long_context: int = 1024
    long_rows: int = 4
    profiles: tuple[str, ...] = ("code", "loop")
    sections: tuple[str, ...] = SECTIONS
    rounds: int = 1
    repeats: int = 1
    scans: int = 512
    scan_rows: int = 16
    compiled: bool = False
    deterministic: bool = False
    minutes: float = 25.0
    seed: int = 0

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, PRESETS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("experts", self.experts, EXPERT_FORMATS)
        _one_of("expert_products", self.expert_products, EXPERT_PRODUCTS)
        if self.expert_products == "fp8" and self.experts != "fp8":
            raise ValueError(
                f"expert_products: got 'fp8', expected 'widened' for experts {self.experts!r}"
            )
        for profile in self.profiles:
            _one_of("profiles", profile, PROFILES)
        for section in self.sections:
            _one_of("sections", section, SECTIONS)
        for name in ("context", "long_context"):
            # A row reads the last token of its context, after at least one token of random state.
            _at_least(name, getattr(self, name), 2)
        for name in ("long_rows", "rounds", "repeats", "scans", "scan_rows"):
            _at_least(name, getattr(self, name), 1)
        for rows in (*self.batches, len(self.batches)):
            _at_least("batches", rows, 1)
        experts = PRESETS[self.preset].n_routed_experts
        if self.unique and not 1 <= self.unique < experts:
            raise ValueError(f"unique: got {self.unique}, expected 0 or 1 to {experts - 1}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed: got {self.seed}, expected 0 to {2**63 - 1}")
        if not 0 < self.minutes < math.inf:
            raise ValueError(f"minutes: got {self.minutes}, expected above 0 and finite")

    @property
    def block(self) -> int:
        """Tokens of a block, those of the recorded schedules."""
        return BLOCK


def defaults_for(preset: str, device: str) -> BenchOptions:
    """Options that suit a preset on a device. Raises ValueError for an unknown preset."""
    _one_of("preset", preset, PRESETS)
    dtype = "bfloat16" if device.startswith("cuda") else "float32"
    if preset == "tiny":
        return BenchOptions(preset, device, dtype)
    return BenchOptions(
        preset,
        device,
        dtype,
        unique=34.0,
        batches=(1, 16, 64, 32, 128, 48, 96),
        context=4096,
        long_context=32768,
        long_rows=16,
        scans=1_000_000,
        scan_rows=256,
        compiled=True,
        repeats=2,
        profiles=("mixed", "prose", "code", "word_problem", "loop"),
    )


def _one_of(field: str, value: str, allowed: object) -> None:
    names = list(allowed)  # type: ignore[call-overload]
    if value not in names:
        raise ValueError(f"{field}: got {value!r}, expected one of {', '.join(names)}")


def _at_least(field: str, value: int, limit: int) -> None:
    if not limit <= value <= _MOST:
        raise ValueError(f"{field}: got {value}, expected {limit} to {_MOST}")
