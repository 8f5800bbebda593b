"""How far a batch job is, and what it has come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class JobCounts:
    """How far a job is: of `rows` those that were done `before` this run; and what this run has
    done and taken: rows, errors among them, tokens of output, passes of both towers, retries."""

    rows: int
    before: int
    rows_of_this_run: int = 0
    errors: int = 0
    tokens: int = 0
    nfe: int = 0
    context_passes: int = 0
    retries: int = 0
    seconds: float = 0.0

    def grown(self, sums: Mapping[str, int], seconds: float) -> JobCounts:
        """With the sums of a meter after so many seconds."""
        return replace(
            self,
            rows_of_this_run=sums.get("rows", 0),
            errors=sums.get("errors", 0),
            tokens=sums.get("tokens", 0),
            nfe=sums.get("passes", 0),
            context_passes=sums.get("context_passes", 0),
            retries=sums.get("retries", 0),
            seconds=seconds,
        )

    @property
    def done(self) -> int:
        """Rows that are done, by any run."""
        return self.before + self.rows_of_this_run

    @property
    def tokens_per_s(self) -> float:
        """Tokens that this run has had written in a second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def tokens_per_pass(self) -> float | None:
        """Tokens for each pass of the denoiser; None if it has made none."""
        return self.tokens / self.nfe if self.nfe else None


@dataclass(frozen=True)
class JobSummary:
    """What a job has come to. `completed` and `errors` are rows of all its runs, the rest is of
    this run."""

    rows: int
    completed: int
    errors: int
    counts: JobCounts
    output: str
    model: str

    def to_dict(self) -> dict[str, Any]:
        """The summary's JSON."""
        counts = self.counts
        rate = counts.tokens_per_pass
        return {
            "rows": self.rows,
            "completed": self.completed,
            "errors": self.errors,
            "rows_of_this_run": counts.rows_of_this_run,
            "completion_tokens": counts.tokens,
            "tokens_per_s": round(counts.tokens_per_s, 1),
            "tokens_per_pass": None if rate is None else round(rate, 3),
            "retries": counts.retries,
            "seconds": round(counts.seconds, 1),
            "model": self.model,
            "output": self.output,
        }
