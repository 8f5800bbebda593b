"""Placements of the towers: memory and tokens/s of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from twotower.planner import commits
from twotower.planner.checked import cycle_speed, lookup_speed
from twotower.planner.devices import device_named
from twotower.planner.flow import Flow, in_step_pair, simulate_pair
from twotower.planner.gpu_memory import GpuMemory, Side, gpu_memory, tower_bytes
from twotower.planner.measured import MeasuredPasses
from twotower.planner.passes import FLOOR, Passes, Reached
from twotower.planner.question import Experts, Question
from twotower.planner.schedules import BLOCK
from twotower.planner.speedup import PassSeconds, best_tokens_per_s, in_step_tokens_per_s
from twotower.towers.config.model_config import TwoTowerConfig

Decoding = Literal["ar", "lookup", "mask_diffusion", "verified"]
LOOKUPS = "AR with lookups"
# Least blocks in a simulated row's schedule, which is replayed twice, and of all rows together. The
# mean steps of 16 blocks of a single row were up to 12 % beside those that were asked for.
_ROW_BLOCKS, _ALL_BLOCKS = 16, 256


@dataclass(frozen=True)
class Estimate:
    """A placement of the towers, its memory and its speed.

    `decoding` is `ar`, `verified` with drafts from lookups alone (`lookup`) or with those of a
    denoiser, or `mask_diffusion`. `denoisers` is 0 where no denoiser is needed; `colocated` means
    both towers on one GPU. `tokens_per_s` is that of all `gpus` under continuous batching,
    `in_step` that of rows which all end their blocks together, `ceiling` is `in_step` with every
    pass at its floor; all are 0 where the placement does not fit. `over_ar` is `tokens_per_s` over
    that of AR on as many GPUs. With `break_even` tokens per denoiser pass (a round of lookups, a
    cycle of `verified`) the placement is as fast as AR in step; None if with no number.
    """

    name: str
    experts: Experts
    denoisers: int
    colocated: bool
    gpus: int
    rows: int
    memory: tuple[GpuMemory, ...]
    decoding: Decoding = "mask_diffusion"
    tokens_per_s: float = 0.0
    in_step: float = 0.0
    ceiling: float = 0.0
    context_busy: float = 0.0
    denoiser_busy: float = 0.0
    over_ar: float = 0.0
    break_even: float | None = None

    @property
    def fits(self) -> bool:
        return all(gpu.fits for gpu in self.memory)

    @property
    def per_gpu(self) -> float:
        return self.tokens_per_s / self.gpus


@dataclass(frozen=True)
class PassTimes:
    """Expected milliseconds and floors of passes over a whole batch, by kind of pass, for one
    format of the experts."""

    experts: Experts
    expected_ms: dict[str, float]
    floor_ms: dict[str, float]


class Estimator:
    """Estimates of all placements for one format of the experts."""

    def __init__(
        self,
        question: Question,
        config: TwoTowerConfig,
        experts: Experts,
        measured: MeasuredPasses | None,
        reached: Reached,
    ) -> None:
        self._question, self._config, self._experts = question, config, experts
        self._device = device = device_named(question.gpu)
        fp8 = experts == "fp8"
        self._weights = tower_bytes(config, fp8=fp8)
        known = measured.ceilings if measured else None
        ceilings = known or device.ceilings()
        context = question.context
        self._expected = Passes(config, ceilings, context, fp8, reached, measured)
        self._floor = Passes(config, ceilings, context, fp8, FLOOR)
        self._seconds = self._pass_seconds(self._expected)
        self._lookups = cache(self._lookup_speed)

    def at(self, batch: int, tokens_per_nfe: float) -> Estimator:
        """The same for another load; times of passes, which do not depend on it, are kept."""
        other = copy(self)
        other._question = replace(self._question, batch=batch, tokens_per_nfe=tokens_per_nfe)
        return other

    @property
    def passes(self) -> Passes:
        """The expected times of passes."""
        return self._expected

    def estimates(self) -> Iterator[Estimate]:
        """AR without and with lookups, both towers on one GPU, one context tower with 1, 2, ...
        denoisers, up to the first placement that does not fit, and checked drafts of a denoiser."""
        ar = self.ar()
        yield ar
        yield self.lookups(ar)
        yield self._over(self.colocated(), ar)
        for pair in self.pairs():
            yield self._over(pair, ar)
        for verified in self.verified(self._question.cycle_tokens):
            yield self._over(verified, ar)

    def pairs(self) -> Iterator[Estimate]:
        """One context tower with 1, 2, ... denoisers, up to the first that does not fit."""
        for denoisers in range(1, self._question.most_denoisers + 1):
            pair = self._pair(denoisers)
            yield pair
            if not pair.fits:
                return

    def times(self) -> PassTimes:
        """Times of passes over a whole batch."""
        return PassTimes(
            self._experts, self._milliseconds(self._expected), self._milliseconds(self._floor)
        )

    def _milliseconds(self, passes: Passes) -> dict[str, float]:
        rows = self._question.batch
        kinds = {"denoise": passes.denoise, "extend": passes.extend, "ar": passes.ar}
        found = {name: 1e3 * seconds(rows) for name, seconds in kinds.items()}
        return {**found, "land": 1e3 * passes.land(rows), "prefill": 1e3 * self._prefill(passes)}

    def _prefill(self, passes: Passes) -> float:
        """Seconds of reading the prompt of one row; 0 if only decoding counts."""
        output = self._question.output_tokens
        return 0.0 if output is None else passes.prefill(self._question.context - output)

    def _prompt_share(self, passes: Passes) -> float:
        """Seconds of a row's prefill that fall on a block of its output; 0 if only decoding
        counts."""
        output = self._question.output_tokens
        return 0.0 if output is None else self._prefill(passes) * BLOCK / output

    def _pass_seconds(self, passes: Passes) -> PassSeconds:
        """Seconds of passes by rows; an extension includes the block's share of its row's
        prefill."""
        share = self._prompt_share(passes)

        @cache
        def extend(rows: int) -> float:
            return passes.extend(rows) + rows * share

        return PassSeconds(cache(passes.denoise), extend)

    def _memory(
        self, role: str, weights: int, rows: int, *, sides: Sequence[Side] = ("context",)
    ) -> GpuMemory:
        return gpu_memory(
            role,
            self._config,
            weights,
            rows,
            self._question.context,
            BLOCK,
            self._device.memory_bytes,
            sides=sides,
        )

    def ar(self) -> Estimate:
        """The context tower alone, a token a pass and row."""
        rows, weights = self._question.batch, self._weights
        memory = self._memory("AR", weights["context"], rows)
        estimate = Estimate("AR", self._experts, 0, False, 1, rows, (memory,), "ar")
        if not estimate.fits:
            return estimate
        expected, floor = self._ar_speed(self._expected), self._ar_speed(self._floor)
        return replace(
            estimate,
            tokens_per_s=expected,
            in_step=expected,
            ceiling=floor,
            context_busy=1.0,
            over_ar=1.0,
        )

    def lookups(self, ar: Estimate) -> Estimate:
        """Verified decoding with lookups and no denoiser, in the memory of `ar`: rounds of the
        question's tokens, or AR's own steps where those are faster."""
        estimate = replace(ar, name=LOOKUPS, decoding="lookup")
        if not estimate.fits:
            return estimate
        rows, tokens = self._question.batch, self._question.lookup_tokens
        speed = max(ar.tokens_per_s, self._lookups(rows, floor=False)(tokens))
        ceiling = max(ar.ceiling, self._lookups(rows, floor=True)(tokens))
        found = replace(estimate, tokens_per_s=speed, in_step=speed, ceiling=ceiling)
        return self._over(found, ar)

    def _lookup_speed(self, rows: int, *, floor: bool) -> Callable[[float], float]:
        """Tokens/s by the tokens of a round."""
        passes = self._floor if floor else self._expected
        return lookup_speed(passes, rows, self._prompt_share(passes) / BLOCK)

    def _ar_speed(self, passes: Passes) -> float:
        rows, output = self._question.batch, self._question.output_tokens
        reading = 0.0 if output is None else rows * self._prefill(passes) / output
        return rows / (passes.ar(rows) + reading)

    def colocated(self) -> Estimate:
        """Diffusion with both towers on one GPU."""
        rows = self._question.batch
        estimate = Estimate("colocated", self._experts, 1, True, 1, rows, (self._shared_memory(),))
        if not estimate.fits:
            return estimate
        steps = self._question.steps
        schedules = commits.rows_of_blocks(steps, rows, _blocks(rows))
        speed = best_tokens_per_s(schedules, self._seconds, rounds=2)
        busy = speed / BLOCK / rows * self._seconds.extend(rows)
        return replace(
            estimate,
            tokens_per_s=speed,
            in_step=self._colocated_in_step(self._expected, steps),
            ceiling=self._colocated_in_step(self._floor, steps),
            context_busy=min(1.0, busy),
            denoiser_busy=max(0.0, 1.0 - busy),
        )

    def _colocated_in_step(self, passes: Passes, steps: float) -> float:
        rows, seconds = self._question.batch, self._pass_seconds(passes)
        return in_step_tokens_per_s(rows, BLOCK, steps, seconds.denoise(rows), seconds.extend(rows))

    def _shared_memory(self) -> GpuMemory:
        both = sum(self._weights.values())
        rows = self._question.batch
        return self._memory("shared", both, rows, sides=("context", "denoiser"))

    def _pair_memory(self, denoisers: int) -> tuple[GpuMemory, GpuMemory]:
        rows, weights = self._question.batch, self._weights
        return (
            self._memory("context", weights["context"], denoisers * rows),
            self._memory("denoiser", weights["denoiser"], rows, sides=("denoiser",)),
        )

    def verified(self, tokens: float) -> Iterator[Estimate]:
        """Verified decoding on one GPU, and on a GPU for each tower.

        A cycle is a draft of one denoiser pass and its check by one pass of the context tower, over
        all rows together; it yields every row `tokens`, the last drawn by the context tower.
        """
        rows = self._question.batch
        shared, pair = (self._shared_memory(),), self._pair_memory(1)
        for estimate in (
            Estimate("verified, colocated", self._experts, 1, True, 1, rows, shared, "verified"),
            Estimate("verified, 1:1", self._experts, 1, False, 2, rows, pair, "verified"),
        ):
            yield self._with_cycles(estimate, tokens) if estimate.fits else estimate

    def _with_cycles(self, estimate: Estimate, tokens: float) -> Estimate:
        """The estimate with the speed of verified decoding."""
        rows, speed = estimate.rows, self._cycle_speed(estimate, tokens)
        floor = self._floor.denoise(rows) + self._floor.verify(rows)
        drafting = self._expected.denoise(rows) + self._landing(estimate)
        busy = drafting * speed / (rows * tokens)
        return replace(
            estimate,
            tokens_per_s=speed,
            in_step=speed,
            ceiling=cycle_speed(floor, rows, tokens, self._prompt_share(self._floor) / BLOCK),
            context_busy=1 - busy,
            denoiser_busy=busy,
        )

    def _cycle_speed(self, estimate: Estimate, tokens: float) -> float:
        rows = estimate.rows
        cycle = self._expected.cycle(rows) + self._landing(estimate)
        return cycle_speed(cycle, rows, tokens, self._prompt_share(self._expected) / BLOCK)

    def _landing(self, estimate: Estimate) -> float:
        """Seconds of a cycle in which a denoiser on another GPU takes over its rows' updates."""
        return 0.0 if estimate.colocated else self._expected.land(estimate.rows)

    def _pair(self, denoisers: int) -> Estimate:
        rows, memory = self._question.batch, self._pair_memory(denoisers)
        name, gpus, total = f"1:{denoisers}", 1 + denoisers, denoisers * rows
        estimate = Estimate(name, self._experts, denoisers, False, gpus, total, memory)
        if not estimate.fits:
            return estimate
        flow = self._flow(denoisers)
        return replace(
            estimate,
            tokens_per_s=flow.tokens_per_s,
            in_step=self._pair_in_step(self._expected, denoisers, self._question.steps),
            ceiling=self._pair_in_step(self._floor, denoisers, self._question.steps),
            context_busy=flow.context_busy,
            denoiser_busy=flow.denoiser_busy,
        )

    def _pair_in_step(self, passes: Passes, denoisers: int, steps: float) -> float:
        rows, seconds = self._question.batch, self._pass_seconds(passes)
        return in_step_pair(rows, BLOCK, steps, denoisers, seconds, passes.land(rows))

    def _flow(self, denoisers: int) -> Flow:
        rows, steps = self._question.batch, self._question.steps
        drawn = commits.rows_of_blocks(steps, denoisers * rows, _blocks(denoisers * rows))
        schedules = [drawn[own::denoisers] for own in range(denoisers)]
        return simulate_pair(schedules, self._seconds, cache(self._expected.land))

    def _over(self, estimate: Estimate, ar: Estimate) -> Estimate:
        """The estimate with `over_ar` and `break_even`, unless it or AR does not fit."""
        if not estimate.fits or not ar.fits:
            return estimate
        wanted = estimate.gpus * ar.tokens_per_s
        even = break_even(lambda steps: self._in_step(estimate, steps), wanted)
        return replace(estimate, over_ar=estimate.tokens_per_s / wanted, break_even=even)

    def _in_step(self, estimate: Estimate, steps: float) -> float:
        if estimate.decoding == "lookup":
            return self._lookups(estimate.rows, floor=False)(BLOCK / steps)
        if estimate.decoding == "verified":
            return self._cycle_speed(estimate, BLOCK / steps)
        if estimate.colocated:
            return self._colocated_in_step(self._expected, steps)
        return self._pair_in_step(self._expected, estimate.denoisers, steps)


def _blocks(rows: int) -> int:
    return max(_ROW_BLOCKS, _ALL_BLOCKS // rows)


def break_even(speed: Callable[[float], float], wanted: float) -> float | None:
    """Tokens per pass at which `speed`, which falls with the steps per block, is `wanted`; None if
    it is lower even at one step."""
    if speed(1.0) < wanted:
        return None
    low, high = 1.0, float(BLOCK)
    if speed(high) >= wanted:
        return 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if speed(middle) >= wanted else (low, middle)
    return BLOCK / low
