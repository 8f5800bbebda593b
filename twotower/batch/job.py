"""A batch job: reads records, asks a service about each, and writes rows as they finish."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray

from twotower.batch.counts import JobCounts, JobSummary
from twotower.batch.inputs import find_inputs
from twotower.batch.job_context import in_our_words, job_context
from twotower.batch.join import count_rows, join_parts
from twotower.batch.journal import JobPlaces, alone, begin
from twotower.batch.meter import JobMeter
from twotower.batch.options import JobOptions
from twotower.batch.recovery import repair_parts, retry_rows
from twotower.batch.scan import InputSummary, scan
from twotower.batch.service import OwnService, RunningServices, ServedModel, Service
from twotower.batch.sink import PartSink
from twotower.batch.source import InputSource
from twotower.batch.watching import POLL_S, watched
from twotower.batch.work import BatchWork
from twotower.data.completer import complete
from twotower.data.targets import target_url
from twotower.towers.errors import InvalidRequestError

# Rows that are committed together: of a short job few, as they are what an interruption loses; of a
# long one more, as every commit writes files of its own.
_MOST_ROWS, _COMMITS = 256, 500
_DEFAULT_IN_FLIGHT = 64
# Requests that wait in the service beside those it works on, so that no row is free.
_WAITING_SHARE = 0.25
# For the last counts, which are printed.
_LAST_S = 30.0
# More would have Ray start more processes, which take longer than the tasks.
_TASK_CPUS = 1


def run_job(
    options: JobOptions,
    watch: Callable[[JobCounts], None] = lambda _: None,
    phase: Callable[[str], None] = lambda _: None,
) -> JobSummary:
    """Runs a job to its end, or goes on with it.

    `watch` is told how far it is about twice a second, `phase` what is done before. Raises
    InvalidRequestError and ConfigError for options, inputs and outputs that cannot be, and
    UnavailableError if the service does not answer at the start. A row that has no answer for
    `patience_s` is an error like others.
    """
    places = JobPlaces.of(options.output, options.format)
    with TemporaryDirectory() as scratch:
        phase("reading the input")
        found = find_inputs(options.inputs, scratch=Path(scratch))
        files = [file for file in found if not places.owns(file.filesystem, file.path)]
        if not files:
            raise InvalidRequestError("input", options.inputs, "files beside the output")
        inputs = scan(files, prompt_column=options.defaults.prompt_column)
        service = _service_of(options)
        model = service.model()
        if options.fresh:
            places.clear()
        begin(places, _facts(options, inputs, places, model))
        with alone(places):
            return _Job(options, inputs, places, service, model.name).run(watch, phase)


def _service_of(options: JobOptions) -> Service:
    if options.targets:
        return RunningServices(tuple(map(target_url, options.targets)), options.api_key)
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

        with watched(lambda: watch(now(POLL_S))):
            self._pipeline(targets, meter)
        last = now(_LAST_S)
        watch(last)
        return last

    def _pipeline(self, targets: tuple[str, ...], meter: JobMeter) -> None:
        """Reads, asks and writes; returns when all rows are committed."""
        with job_context(self._places), in_our_words():
            self._write(self._ask(targets, meter))

    def _ask(self, targets: tuple[str, ...], meter: JobMeter) -> ray.data.Dataset:
        """The rows of output, evaluated lazily."""
        options, inputs = self._options, self._inputs
        source = InputSource(
            inputs.files,
            duplicates=inputs.duplicates,
            prompt_column=options.defaults.prompt_column,
            # What was read from stdin lies on this node.
            distributed="-" not in options.inputs,
        )
        return complete(
            ray.data.read_datasource(source, num_cpus=_TASK_CPUS),
            BatchWork(options.defaults),
            targets,
            concurrency=self._concurrency(),
            callers=options.callers,
            api_key=options.api_key,
            patience_s=options.patience_s,
            meter=meter,
        )

    def _write(self, done: ray.data.Dataset) -> None:
        """Writes rows of output as they finish; returns when all are committed."""
        wanted = max(1, min(_MOST_ROWS, self._inputs.total_rows // _COMMITS))
        sink = PartSink(
            self._places.parts,
            names=[file.name for file in self._inputs.files],
            format=self._places.format,
            rows_per_part=self._options.rows_per_commit or wanted,
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
