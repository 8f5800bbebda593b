"""Runs a sweep: decodes each point that has not ended yet, and writes its report."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from twotower.sweep.costs import Bench, PassCosts, measure, read_costs
from twotower.sweep.folder import COSTS, SweepFolder
from twotower.sweep.grid import AR, REFERENCE, Grid, Point
from twotower.sweep.metrics import Row, figures
from twotower.sweep.prompts import SweepPrompt, digest, read_prompts
from twotower.sweep.scoring import Scorer, scorers_named
from twotower.sweep.towers import Towers, rows_of, token_ids
from twotower.towers.checkpoint.fingerprint import fingerprint
from twotower.towers.checkpoint.weights import parse_device, parse_dtype, resolve_checkpoint
from twotower.towers.limits import limit_threads
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import GenerationParams

# How much of how much is done, and what is next.
Progress = Callable[[float, float | None, str], None]


@dataclass(frozen=True)
class SweepOptions:
    """What a sweep measures, on what. Raises InvalidRequestError for a value outside its limits.

    `prompts` is a file (`read_prompts`), of which the first `limit` are taken; `model` a folder or
    a hub id, None the shipped model. Up to `batch` rows are decoded together; prompt i has seed
    `seed` + i. A point is decoded `repeats` times, of whose tokens/s the median counts. `scores`
    are names of task scores, `pass_costs` a file of them (None: measured here).
    """

    prompts: Path
    out: Path
    grid: Grid = field(default_factory=Grid)
    model: str | None = None
    max_tokens: int = 64
    temperature: float = 0.0
    limit: int | None = None
    repeats: int = 1
    batch: int = 16
    seed: int = 0
    scores: tuple[str, ...] = ()
    pass_costs: Path | None = None
    ignore_eos: bool = False
    fresh: bool = False
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("repeats", "batch", "threads"):
            check_whole(name, getattr(self, name), 1)
        if self.limit is not None:
            check_whole("limit", self.limit, 1)
        parse_device(self.device)
        parse_dtype(self.dtype)

    def base(self, eos_token_id: int | None = None) -> GenerationParams:
        """The parameters that all points share."""
        return GenerationParams(
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            eos_token_id=None if self.ignore_eos else eos_token_id,
        )


@dataclass(frozen=True)
class Sweep:
    """A sweep that has ended: its settings, costs of passes, and finished points in the order in
    which they were measured."""

    identity: Mapping[str, Any]
    costs: PassCosts
    points: Sequence[Mapping[str, Any]]


def run_sweep(options: SweepOptions, progress: Progress | None = None) -> Sweep:
    """Decodes what is missing in the folder `options.out`, and returns all of its points."""
    prompts = read_prompts(options.prompts, options.limit)
    points = options.grid.points(options.base())
    scorers = scorers_named(options.scores, prompts)
    given = read_costs(options.pass_costs, options.batch) if options.pass_costs else None
    torch.set_num_threads(options.threads)
    limit_threads()
    model = resolve_checkpoint(options.model)
    folder = SweepFolder(options.out, _identity(options, model, prompts), fresh=options.fresh)
    run = _Run(options, folder, prompts, scorers, points, progress or (lambda *_: None))
    return run.to_end(model, given)


def _identity(options: SweepOptions, model: Path, prompts: Sequence[SweepPrompt]) -> dict[str, Any]:
    return {
        "model": f"{model.name} {fingerprint(model)[:16]}",
        "prompts": f"{len(prompts)} {digest(prompts)}",
        "seed": options.seed,
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "ignore_eos": options.ignore_eos,
        "batch": options.batch,
        "repeats": options.repeats,
        "scores": list(options.scores),
        "device": options.device,
        "dtype": options.dtype,
        "threads": options.threads,
    }


class _Run:
    """A sweep on its way. The model is loaded when the first thing is missing."""

    def __init__(
        self,
        options: SweepOptions,
        folder: SweepFolder,
        prompts: Sequence[SweepPrompt],
        scorers: Mapping[str, Scorer],
        points: Sequence[Point],
        progress: Progress,
    ) -> None:
        self._options = options
        self._folder = folder
        self._prompts = prompts
        self._scorers = scorers
        self._points = points
        self._progress = progress
        self._towers: Towers | None = None
        self._token_ids: list[list[int]] = []
        self._rows: dict[str, list[Row]] = {}

    def to_end(self, model: Path, given: PassCosts | None) -> Sweep:
        """Measures what is missing."""
        missing = [point for point in self._points if point.name not in self._folder.points]
        blocks = sorted({point.params(self._options.base()).block_size for point in self._points})
        costs = given or self._known_costs(blocks)
        if missing or costs is None:
            self._load(model)
        if costs is None:
            costs = self._measured_costs(blocks)
            self._folder.write(COSTS, json.dumps(costs.to_dict(), indent=2) + "\n")
        done = len(self._points) - len(missing)
        for index, point in enumerate(missing):
            self._progress(done + index, len(self._points), point.name)
            self._measure(point)
        self._progress(len(self._points), len(self._points), "")
        return Sweep(self._folder.identity, costs, list(self._folder.points.values()))

    def _load(self, model: Path) -> None:
        self._progress(0, None, "loading")
        options = self._options
        self._token_ids = token_ids(model, self._prompts)
        longest = max(map(len, self._token_ids))
        rooms = [point.params(options.base()).context_tokens(longest) for point in self._points]
        self._towers = Towers(model, options.device, options.dtype, options.batch, max(rooms))

    def _measure(self, point: Point) -> None:
        rows, seconds = self._decode(point)
        self._rows[point.name] = rows
        reference = self._rows_of(REFERENCE if self._options.temperature else AR)
        baseline = self._rows_of(AR) if point.name != REFERENCE else rows
        found = figures(rows, reference, baseline)
        self._folder.write_rows(point.name, rows)
        self._folder.add(
            {
                "name": point.name,
                "strategy": point.strategy,
                **_shown(point, point.params(self._options.base())),
                **found,
                "seconds": round(seconds, 3),
                "tokens_per_s": found["tokens"] / seconds,
            }
        )

    def _rows_of(self, name: str) -> list[Row]:
        """Rows of a point that was measured before: now, by an earlier run, or anew if these are
        gone."""
        if name not in self._rows:
            point = next(point for point in self._points if point.name == name)
            self._rows[name] = self._folder.read_rows(name) or self._decode(point)[0]
        return self._rows[name]

    def _decode(self, point: Point) -> tuple[list[Row], float]:
        """Rows of a point and the median of the seconds that they took."""
        towers = self._loaded()
        params = point.params(self._options.base(towers.model.config.eos_token_id))
        seconds = []
        for _ in range(self._options.repeats):
            results, spent = towers.decode(self._token_ids, params)
            seconds.append(spent)
        rows = rows_of(towers, self._prompts, self._token_ids, results, params, self._scorers)
        return rows, statistics.median(seconds)

    def _loaded(self) -> Towers:
        assert self._towers is not None, "loaded where a point is missing"
        return self._towers

    def _known_costs(self, blocks: Sequence[int]) -> PassCosts | None:
        """Costs that an earlier run has measured, if it did for every block size."""
        path = self._folder.path / COSTS
        if not path.exists():
            return None
        known = read_costs(path, self._options.batch)
        return known if set(blocks) <= set(known.blocks) else None

    def _measured_costs(self, blocks: Sequence[int]) -> PassCosts:
        towers, options = self._loaded(), self._options
        mean = round(statistics.mean(map(len, self._token_ids))) + options.max_tokens // 2
        bench = Bench(towers.context.tower, towers.denoiser.tower, options.batch, mean)
        source = (
            f"measured here: {options.device}, {options.dtype}, {options.threads} threads, "
            f"{mean} tokens of context"
        )
        return measure(bench, blocks, source, partial(self._progress, 0, None))


def _shown(point: Point, params: GenerationParams) -> dict[str, Any]:
    """Mode and dials of a point, None for those that do nothing in its mode, and whatever else its
    strategy sets."""
    masked, drafts = params.mode == "mask_diffusion", params.mode == "verified"
    checked = params.traits.unit == "draft"
    dials = {
        "mode": params.mode,
        "temperature": params.temperature,
        "block_size": params.block_size if masked or checked else None,
        "confidence_threshold": params.confidence_threshold if masked else None,
        "steps_per_block": params.steps_per_block if masked else None,
        "draft_steps": params.draft_steps if drafts and params.uses_denoiser else None,
    }
    return {**point.overrides, **dials}
