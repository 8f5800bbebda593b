"""A phase of training: steps under a schedule, with checkpoints that continue bit by bit."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from twotower.towers.training.model import Loads, cast_parameters
from twotower.towers.training.optimizer import Optimizer, OptimizerSettings
from twotower.towers.training.parameters import Parameters

WARM_UP_STEPS = 60
CONSTANT_UNTIL = 0.45
FINAL_RATE = 0.02
ROUTER_BIAS_RATE = 0.003

# Seconds between progress lines, held-out losses and checkpoints.
REPORT_SECONDS, HELD_OUT_SECONDS, CHECKPOINT_SECONDS = 20.0, 300.0, 180.0

# Gets what is done, of how much, and what it is: of a phase its share of 1, step and loss.
Progress = Callable[[float, float, str], None]
# From cast parameters and the share of the phase that is done; fills in the experts' loads.
LossFunction = Callable[[Parameters, float, Loads], Tensor]


@dataclass(frozen=True)
class Budget:
    """Length of a phase: `minutes` of wall-clock time, or `steps` if they are given; without
    either nothing is trained."""

    minutes: float = 0.0
    steps: int | None = None

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent, in [0, 1]."""
        if not self.steps and not self.minutes:
            return 1.0
        spent = step / self.steps if self.steps else seconds / (self.minutes * 60)
        return min(1.0, spent)


@dataclass
class PhaseRecord:
    """Steps, tokens, seconds and losses (step, nats) of a phase; kept in its checkpoint."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    losses: list[tuple[int, float]] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the speed in tokens per second."""
        return {**asdict(self), "tokens_per_second": self.tokens / max(self.seconds, 1e-9)}


def rate_factor(step: int, progress: float) -> float:
    """Warm-up over the first steps, constant to 45 % of the budget, then linear down to 2 %."""
    warm = min(1.0, (step + 1) / WARM_UP_STEPS)
    if progress <= CONSTANT_UNTIL:
        return warm
    left = (1.0 - progress) / (1.0 - CONSTANT_UNTIL)
    return warm * (FINAL_RATE + (1.0 - FINAL_RATE) * left)


class Phase:
    """A phase of training: parameters, optimizer, generator of random numbers, and record."""

    def __init__(
        self,
        name: str,
        params: Parameters,
        settings: OptimizerSettings,
        generator: Generator,
        checkpoint: Path,
    ) -> None:
        self.name = name
        self.params = params
        self.record = PhaseRecord()
        self.generator = generator
        self._optimizer = Optimizer(params, settings)
        self._checkpoint = checkpoint
        for trained in self._optimizer.trained:
            params[trained].requires_grad_(True)

    def restore(self) -> bool:
        """Loads the checkpoint if its file exists; True if it was loaded."""
        if not self._checkpoint.exists():
            return False
        saved = torch.load(self._checkpoint, weights_only=True)
        with torch.no_grad():
            for name, value in self.params.items():
                value.copy_(saved["params"][name])
        self._optimizer.restore(saved["optimizer"])
        self.generator.set_state(saved["generator"])
        self.record = PhaseRecord(**saved["record"])
        return True

    def save(self) -> None:
        """Writes the checkpoint; after a crash while writing the previous checkpoint is intact."""
        unfinished = self._checkpoint.with_suffix(".part")
        torch.save(
            {
                "params": {name: value.detach() for name, value in self.params.items()},
                "optimizer": self._optimizer.state(),
                "generator": self.generator.get_state(),
                "record": asdict(self.record),
            },
            unfinished,
        )
        os.replace(unfinished, self._checkpoint)

    def run(
        self,
        budget: Budget,
        dtype: torch.dtype,
        loss_function: LossFunction,
        tokens_per_step: int,
        held_out: Callable[[Parameters], float],
        report: Callable[[str], None],
        shown: Progress | None = None,
    ) -> None:
        """Trains until the budget is spent; saves a checkpoint at intervals and at the end.

        `report` gets a line at intervals, `shown` the share of the budget after each step.
        """
        record = self.record
        if budget.progress(record.steps, record.seconds) >= 1.0:
            return
        offset = time.monotonic() - record.seconds
        marks = {"report": record.seconds, "held_out": record.seconds, "checkpoint": record.seconds}
        losses: list[float] = []
        while (progress := budget.progress(record.steps, record.seconds)) < 1.0:
            losses.append(self._step(progress, dtype, loss_function))
            record.steps += 1
            record.tokens += tokens_per_step
            record.seconds = time.monotonic() - offset
            if shown is not None:
                spent = budget.progress(record.steps, record.seconds)
                shown(spent, 1.0, f"{self.name}, step {record.steps}, loss {losses[-1]:.3f}")
            if record.seconds - marks["report"] >= REPORT_SECONDS:
                marks["report"] = record.seconds
                self._report(losses, progress, report)
            if record.seconds - marks["held_out"] >= HELD_OUT_SECONDS:
                self._evaluate(held_out, dtype, report)
                record.seconds = marks["held_out"] = time.monotonic() - offset
            if record.seconds - marks["checkpoint"] >= CHECKPOINT_SECONDS:
                self.save()
                marks["checkpoint"] = record.seconds
        self._report(losses, budget.progress(record.steps, record.seconds), report)
        self._evaluate(held_out, dtype, report)
        self.save()

    def cast(self, dtype: torch.dtype) -> Parameters:
        """The parameters without gradients, in `dtype`."""
        return {name: value.detach() for name, value in cast_parameters(self.params, dtype).items()}

    def _step(self, progress: float, dtype: torch.dtype, loss_function: LossFunction) -> float:
        """One update of all parameters; returns the loss in nats. Raises FloatingPointError if it
        is not a number."""
        loads: Loads = {}
        loss = loss_function(cast_parameters(self.params, dtype), progress, loads)
        names = self._optimizer.trained
        # A row of the embedding or a whole expert may be unused in a step, and has no gradient.
        grads = torch.autograd.grad(
            loss, [self.params[name] for name in names], materialize_grads=True
        )
        value = loss.item()
        if value != value:
            raise FloatingPointError(f"{self.name}: loss is not a number, step {self.record.steps}")
        factor = rate_factor(self.record.steps, progress)
        self._optimizer.step(dict(zip(names, grads, strict=True)), factor)
        self._balance(loads, factor)
        return value

    @torch.no_grad()
    def _balance(self, loads: Loads, factor: float) -> None:
        """Moves each expert's router bias towards an even load."""
        for name, load in loads.items():
            self.params[name].add_(torch.sign(load.mean() - load), alpha=ROUTER_BIAS_RATE * factor)

    def _report(self, losses: list[float], progress: float, report: Callable[[str], None]) -> None:
        """Records and reports the mean of `losses`, which it empties."""
        if not losses:
            return
        loss, record = sum(losses) / len(losses), self.record
        losses.clear()
        record.losses.append((record.steps, loss))
        speed = record.tokens / max(record.seconds, 1e-9)
        report(
            f"{self.name} step {record.steps} ({progress:.1%}): loss {loss:.3f}, "
            f"{record.tokens / 1e6:.2f} M tokens, {speed:.0f} tokens/s"
        )

    def _evaluate(
        self,
        held_out: Callable[[Parameters], float],
        dtype: torch.dtype,
        report: Callable[[str], None],
    ) -> None:
        """Records and reports the loss on held-out text."""
        loss = held_out(self.cast(dtype))
        self.record.held_out.append((self.record.steps, loss))
        report(f"{self.name} step {self.record.steps}: held-out loss {loss:.3f}")
