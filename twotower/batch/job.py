"""A batch job: reads records, asks a service about each, and writes rows as they finish."""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError

from twotower.batch.filesystems import open_filesystem
from twotower.batch.inputs import find_inputs
from twotower.batch.join import count_rows, join_parts
from twotower.batch.journal import JobPlaces, begin
from twotower.batch.meter import JobMeter
from twotower.batch.recovery import repair_parts, retry_rows
from twotower.batch.requests import BatchDefaults
from twotower.batch.scan import InputSummary, scan
from twotower.batch.service import OwnService, RunningServices, ServedModel, Service
from twotower.batch.sink import Format, PartSink
from twotower.batch.source import InputSource
from twotower.batch.work import BatchWork
from twotower.data.completer import complete
from twotower.towers.errors import InvalidRequestError, UnavailableError

# Rows that are committed together: of a short job few, as they are what an interruption loses; of a
# long one more, as every commit writes files of its own.
_MOST_ROWS, _COMMITS = 256, 500
_DEFAULT_IN_FLIGHT, MOST_IN_FLIGHT = 64, 65_536
# Requests that wait in the service beside those it works on, so that no row is free.
_WAITING_SHARE = 0.25
_POLL_S = 0.5
# For the last counts, which are printed.
_LAST_S = 30.0
# More would have Ray start more processes, which take longer than the tasks.
_TASK_CPUS = 1
# A file is read in such pieces, and no further ahead than rows are wanted.
_BLOCK_BYTES = 1 << 20
# What reading a job's checkpoint takes beside the identifiers themselves.
_FILTER_BYTES = 64 << 20


@dataclass(frozen=True)
class JobOptions:
    """What a job does. `service` has the settings of a service of its own, for a job without
    `targets`; `concurrency` is the number of requests in flight of each of `callers` processes
    (None: what the service has room for)."""

    inputs: tuple[str, ...]
    output: str
    defaults: BatchDefaults
    targets: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    service: Mapping[str, Any] = field(default_factory=dict)
    format: Format | None = None
    concurrency: int | None = None
    callers: tuple[int, int] = (1, 1)
    patience_s: float = 600.0
    rows_per_commit: int | None = None
    ordered: bool = False
    retry_errors: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, value in self.defaults.body.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise InvalidRequestError(name, value, "a value that JSON has") from None
        if not 0 <= self.defaults.seed < 2**63:
            raise InvalidRequestError("seed", self.defaults.seed, "0 to 2^63 - 1")
        if not 0 < self.patience_s < math.inf:
            raise InvalidRequestError("patience", self.patience_s, "a number above 0")
        for name in ("concurrency", "rows_per_commit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_IN_FLIGHT:
                raise InvalidRequestError(name, value, f"1 to {MOST_IN_FLIGHT}")


@dataclass(frozen=True)
class JobCounts:
    """How far a job is: `done` of `rows`, of them `before` this run; and what this run has taken:
    errors, tokens of output, passes of both towers, retries of requests."""

    rows: int
    before: int
    done: int = 0
    errors: int = 0
    tokens: int = 0
    nfe: int = 0
    context_passes: int = 0
    retries: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "done", max(self.done, self.before))

    def grown(self, sums: Mapping[str, int], seconds: float) -> JobCounts:
        """With the sums of a meter after so many seconds."""
        return replace(
            self,
            done=self.before + sums.get("rows", 0),
            errors=sums.get("errors", 0),
            tokens=sums.get("tokens", 0),
            nfe=sums.get("passes", 0),
            context_passes=sums.get("context_passes", 0),
            retries=sums.get("retries", 0),
            seconds=seconds,
        )

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
            "rows_of_this_run": counts.done - counts.before,
            "completion_tokens": counts.tokens,
            "tokens_per_s": round(counts.tokens_per_s, 1),
            "tokens_per_pass": None if rate is None else round(rate, 3),
            "retries": counts.retries,
            "seconds": round(counts.seconds, 1),
            "model": self.model,
            "output": self.output,
        }


def run_job(
    options: JobOptions,
    watch: Callable[[JobCounts], None] = lambda _: None,
    phase: Callable[[str], None] = lambda _: None,
) -> JobSummary:
    """Runs a job to its end, or goes on with it.

    `watch` is told how far it is about twice a second, `phase` what is done before. Raises
    InvalidRequestError and ConfigError for options, inputs and outputs that cannot be, and
    UnavailableError if the service is lost for longer than `patience_s`.
    """
    places = JobPlaces.of(options.output, options.format)
    with TemporaryDirectory() as scratch:
        phase("reading the input")
        files = find_inputs(options.inputs, scratch=Path(scratch))
        inputs = scan(files, prompt_column=options.defaults.prompt_column)
        service = _service_of(options)
        model = service.model()
        if options.fresh:
            places.clear()
        begin(places, _facts(options, inputs, places, model))
        return _Job(options, inputs, places, service, model.name).run(watch, phase)


def _service_of(options: JobOptions) -> Service:
    if options.targets:
        return RunningServices(options.targets, options.api_key)
    return OwnService.of(options.service)


def _facts(
    options: JobOptions, inputs: InputSummary, places: JobPlaces, model: ServedModel
) -> dict[str, Any]:
    """What rows depend on."""
    defaults = options.defaults
    return {
        "input": {
            "files": len(inputs.files),
            "rows": inputs.total_rows,
            "content": inputs.fingerprint,
        },
        "model": {"name": model.name, "fingerprint": model.fingerprint},
        "parameters": dict(defaults.body),
        "prompt_column": defaults.prompt_column,
        "seed": defaults.seed,
        "format": places.format,
    }


class _Job:
    """A job that has begun."""

    def __init__(
        self,
        options: JobOptions,
        inputs: InputSummary,
        places: JobPlaces,
        service: Service,
        model: str,
    ) -> None:
        self._options = options
        self._inputs = inputs
        self._places = places
        self._service = service
        self._model = model

    def run(self, watch: Callable[[JobCounts], None], phase: Callable[[str], None]) -> JobSummary:
        """All rows that are not done yet."""
        places, rows = self._places, self._inputs.total_rows
        phase("looking for what is done")
        repair_parts(places.parts, places.checkpoints)
        if self._options.retry_errors:
            retry_rows(places.parts, places.checkpoints)
        before = sum(count_rows(places.parts, places.checkpoints))
        last = JobCounts(rows=rows, before=before)
        if before < rows:
            with self._service.running(phase) as targets:
                last = self._complete(targets, last, watch)
        phase("writing the output")
        completed, errors = self._finish()
        return JobSummary(rows, completed, errors, last, self._options.output, self._model)

    def _complete(
        self, targets: tuple[str, ...], counts: JobCounts, watch: Callable[[JobCounts], None]
    ) -> JobCounts:
        """Asks the services about the rows that are left; `counts` grown by that."""
        meter, began = JobMeter(), time.monotonic()

        def now(wait_s: float) -> JobCounts:
            return counts.grown(meter.sums(wait_s), time.monotonic() - began)

        with _in_background(lambda: self._pipeline(targets, meter)) as ended:
            while not ended.wait(_POLL_S):
                watch(now(_POLL_S))
        last = now(_LAST_S)
        watch(last)
        return last

    def _pipeline(self, targets: tuple[str, ...], meter: JobMeter) -> None:
        """Reads, asks and writes; returns when all rows are committed."""
        options, inputs, places = self._options, self._inputs, self._places
        _set_context(places)
        source = InputSource(
            inputs.files,
            duplicates=inputs.duplicates,
            prompt_column=options.defaults.prompt_column,
        )
        done = complete(
            ray.data.read_datasource(source, num_cpus=_TASK_CPUS),
            BatchWork(options.defaults),
            targets,
            concurrency=self._concurrency(),
            callers=options.callers,
            api_key=options.api_key,
            patience_s=options.patience_s,
            meter=meter,
        )
        wanted = min(_MOST_ROWS, inputs.total_rows // _COMMITS)
        sink = PartSink(
            places.parts,
            names=[file.name for file in inputs.files],
            format=places.format,
            rows_per_part=options.rows_per_commit or wanted,
        )
        done.write_datasink(sink, ray_remote_args={"num_cpus": _TASK_CPUS})

    def _concurrency(self) -> int:
        """Requests of each caller that are in flight."""
        if self._options.concurrency is not None:
            return self._options.concurrency
        room = self._service.max_rows
        if room is None:
            return _DEFAULT_IN_FLIGHT
        return max(1, int(room * (1 + _WAITING_SHARE)) // self._options.callers[0])

    def _finish(self) -> tuple[int, int]:
        """Joins the parts if a file is wanted; rows that are completed, and that are errors."""
        places = self._places
        if places.file is None:
            return count_rows(places.parts, places.checkpoints)
        joined = join_parts(
            places.parts,
            places.checkpoints,
            places.file,
            ordered=self._options.ordered,
            format=places.format,
        )
        return joined.rows, joined.errors


def _set_context(places: JobPlaces) -> None:
    """Ray Data's settings of the job."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    context.target_max_block_size = _BLOCK_BYTES
    filesystem, path = open_filesystem(places.checkpoints)
    checkpoint = CheckpointConfig(
        id_column="row",
        checkpoint_path=path,
        delete_checkpoint_on_success=False,
        override_filesystem=filesystem,
    )
    checkpoint.checkpoint_actor_memory_bytes = _FILTER_BYTES
    checkpoint.checkpoint_actor_pool_max_size = 1
    context.checkpoint_config = checkpoint
    for name in ("ray.data", "ray"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _in_background(work: Callable[[], None]) -> Iterator[threading.Event]:
    """Runs `work` in a thread, so that this one can show its progress and be interrupted; the event
    is set at its end. Its error is raised at the end of the block."""
    ended, failures = threading.Event(), []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    thread = threading.Thread(target=run, name="pipeline", daemon=True)
    thread.start()
    yield ended
    if failures:
        raise _as_ours(failures[0]) from failures[0]


def _as_ours(error: BaseException) -> BaseException:
    """An error of the pipeline, in one line if it is Ray's."""
    if not isinstance(error, RayError):
        return error
    lines = [line for line in str(error).splitlines() if line.strip()]
    return UnavailableError(f"the job's pipeline failed: {lines[-1] if lines else error!r}")
