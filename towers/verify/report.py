"""Comparison of computed and recorded numbers, with the tolerances of both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from twotower.towers.errors import cut_off

LOGIT_TOLERANCE = 2e-3
STATE_TOLERANCE = 5e-4
# How many times the usual error a single number may be off by.
PEAK = 15
# An entry of manifest.json, and the recorded tensors of that case by name.
Case = Mapping[str, Any]
Recorded = Mapping[str, Tensor]


@dataclass
class CaseReport:
    """Result of a case: number of checks, largest float error, and a line for each difference."""

    case_id: str
    kind: str
    checks: int = 0
    max_error: float = 0.0
    misses: list[str] = field(default_factory=list)

    def close(self, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Compares floats; a miss if shapes differ or a difference is above `tolerance` or NaN."""
        self.checks += 1
        got = got.detach().float().cpu()
        if got.shape != want.shape:
            self.misses.append(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
            return
        error = float((got - want.float()).abs().max()) if want.numel() else 0.0
        self.max_error = max(self.max_error, error)
        if not error <= tolerance:
            self.misses.append(f"{name}: off by {error:.2e}, limit {tolerance:.0e}")

    def near(self, name: str, got: Tensor, want: Tensor, limit: float) -> None:
        """Compares floats relative to their size; a miss if shapes differ, if the root of the mean
        square error is above `limit` of that of `want`, or the largest above PEAK times that."""
        self.checks += 1
        got, want = got.detach().double().cpu(), want.double()
        if got.shape != want.shape:
            self.misses.append(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
            return
        size = float(want.square().mean().sqrt())
        error = float((got - want).square().mean().sqrt()) / size
        peak = float((got - want).abs().max()) / size
        self.max_error = max(self.max_error, error)
        if not (error <= limit and peak <= PEAK * limit):
            self.misses.append(
                f"{name}: off by {error:.1e} of its size, at most {peak:.1e}, limits {limit:.0e} "
                f"and {PEAK * limit:.0e}"
            )

    def same(self, name: str, got: object, want: object) -> None:
        """Compares token ids and counts exactly."""
        self.checks += 1
        if got != want:
            self.misses.append(
                f"{name}: got {cut_off(str(got), 60)}, expected {cut_off(str(want), 60)}"
            )

    def line(self) -> str:
        """The result on one line of text: verdict, kind, id, checks and at most three misses."""
        verdict = "ok  " if not self.misses else "MISS"
        text = f"{verdict} {self.kind:<14} {self.case_id:<16} {self.checks:>4} checks"
        text += f"  max error {self.max_error:.1e}"
        return text if not self.misses else f"{text}  {'; '.join(self.misses[:3])}"
