"""The step of a Ray Data pipeline that asks a service about every row."""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import pyarrow as pa
from ray.data import ActorPoolStrategy, Dataset
from ray.data.block import BlockAccessor

from twotower.data.caller import KEY_VARIABLE, Answer, ServiceCaller
from twotower.data.counts import Counts, Meter
from twotower.towers.errors import InvalidRequestError

# Rows of a block, unless it is said: few, as a block's rows wait for the last of them.
MOST_ROWS_OF_A_BLOCK = 32


class Request(Protocol):
    """What is posted for a row."""

    @property
    def url(self) -> str:
        """The path, such as "/v1/completions"."""
        ...

    @property
    def body(self) -> Mapping[str, Any]:
        """The body, which JSON can hold."""
        ...


class RowWork(Protocol):
    """What a pipeline makes of rows and answers. It is pickled to the actors.

    An exception of `row_errors` out of `to_request` makes the row an error row (`to_error`) and no
    request; any other exception of a method ends the pipeline. `columns` are those of a batch that
    the rows have, None for all.
    """

    @property
    def row_errors(self) -> tuple[type[Exception], ...]:
        """Exceptions that are a row's fault."""
        ...

    @property
    def columns(self) -> Sequence[str] | None:
        """Columns that rows are made of."""
        ...

    def to_request(self, row: Mapping[str, Any]) -> Request:
        """The request of a row (column -> value)."""
        ...

    def to_output(self, row: Mapping[str, Any], request: Any, answer: Answer) -> dict[str, Any]:
        """The output of a row that was answered, well or not; `request` is that of to_request."""
        ...

    def to_error(self, row: Mapping[str, Any], error: Any) -> dict[str, Any]:
        """The output of a row that made no request."""
        ...

    def to_table(self, batch: pa.Table, outputs: Sequence[dict[str, Any]]) -> pa.Table:
        """The result of a batch: the outputs of its rows, in its order."""
        ...


class Completer:
    """Callable class for `Dataset.map_batches`, with the options of `map_options`.

    Rows of all batches that an actor has at once share its `concurrency` places, so a batch whose
    last row is slow keeps none of the others waiting. The actor's requests are made by one
    ServiceCaller, which has `targets`, `concurrency`, `api_key` and `patience_s`.
    """

    def __init__(
        self,
        work: RowWork,
        targets: str | Sequence[str],
        *,
        concurrency: int,
        api_key: str | None = None,
        patience_s: float = 600.0,
        meter: Meter | None = None,
    ) -> None:
        self._work = work
        self._connect = partial(
            ServiceCaller,
            targets,
            concurrency=concurrency,
            api_key=api_key,
            patience_s=patience_s,
        )
        self._counts = Counts(meter)
        self._left = 0
        # Made in the event loop, which Ray starts after this.
        self._caller: ServiceCaller | None = None

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """The table of a batch's outputs, when all of its rows have theirs."""
        if self._caller is None:
            self._caller = self._connect()
        rows = _rows(batch, self._work.columns)
        self._left += len(rows)
        tasks = [asyncio.create_task(self._output(self._caller, row)) for row in rows]
        try:
            outputs = await asyncio.gather(*tasks)
        finally:
            # After an error: the others would be sent for nothing.
            for task in tasks:
                task.cancel()
        return self._work.to_table(batch, outputs)

    async def close(self) -> None:
        """Closes the connections; an actor's end does it, too."""
        if self._caller is not None:
            await self._caller.close()
            self._caller = None

    async def _output(self, caller: ServiceCaller, row: Mapping[str, Any]) -> dict[str, Any]:
        answer = None
        try:
            request = self._work.to_request(row)
            answer = await caller.post(request.url, request.body)
            output = self._work.to_output(row, request, answer)
        except self._work.row_errors as error:
            output = self._work.to_error(row, error)
        finally:
            self._left -= 1
        self._counts.finished(answer, self._left)
        return output


def map_options(
    concurrency: int, callers: int | tuple[int, int], batch_size: int
) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` with which a Completer keeps `concurrency` rows in flight.

    They suit a dataset of blocks of `batch_size` rows (see `complete`). Ray makes a task of each
    block, runs so many tasks of an actor at once (each in a thread that waits for the actor's one
    event loop), and has as many again queued, which is what makes a pool of `callers` = (least,
    most) grow. A block leaves when its last row has its answer, so an actor must hold more rows
    than are in flight: by Little's law `concurrency` times the ratio of a block's time to a row's,
    which is 1 + 1/2 + ... + 1/`batch_size` for exponential times and less for even ones. So many
    rows are held, and at least twice `concurrency`: 2.1 times for blocks of 4 rows, 3.4 for 16.

    Callers wait more than they compute: they claim no processor.
    """
    least, most = (callers, callers) if isinstance(callers, int) else callers
    if not 1 <= least <= most:
        raise InvalidRequestError("callers", callers, "1 <= least <= most")
    calls = max(2, math.ceil(concurrency * max(2.0, _harmonic(batch_size)) / batch_size))
    pool = ActorPoolStrategy(
        min_size=least,
        max_size=most,
        max_concurrent_calls_per_actor=calls,
        max_tasks_in_flight_per_actor=2 * calls,
    )
    return {
        "batch_size": batch_size,
        "batch_format": "pyarrow",
        "compute": pool,
        "num_cpus": 0,
    }


def default_batch_size(concurrency: int) -> int:
    """Rows of a block: a quarter of what is in flight, within 1 and 32.

    Each block is a task of Ray, which had 17 to 38 of them done in a second on two busy cores: with
    a 16th, half of 64 places were empty where rows took 0.5 s.
    """
    return min(MOST_ROWS_OF_A_BLOCK, max(1, concurrency // 4))


def complete(
    ds: Dataset,
    work: RowWork,
    targets: str | Sequence[str],
    *,
    concurrency: int,
    callers: int | tuple[int, int] = 1,
    batch_size: int | None = None,
    api_key: str | None = None,
    patience_s: float = 600.0,
    meter: Meter | None = None,
) -> Dataset:
    """`ds` in blocks of `batch_size` rows, each row asked about by a Completer.

    Without the cut a block of the source would be one task: its rows would go on together, when the
    last of them is done, and in Ray's own order. It also keeps Ray from reading the source inside
    the callers. `api_key` None means TWOTOWER_API_KEY of this process, not of the actors'.
    """
    key = api_key if api_key is not None else os.environ.get(KEY_VARIABLE)
    # What is wrong with them is said here, and not by an actor.
    ServiceCaller(targets, concurrency=concurrency, api_key=key, patience_s=patience_s)
    size = default_batch_size(concurrency) if batch_size is None else batch_size
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InvalidRequestError("batch_size", size, "a whole number from 1 on")
    arguments = {
        "concurrency": concurrency,
        "api_key": key,
        "patience_s": patience_s,
        "meter": meter,
    }
    return ds.repartition(target_num_rows_per_block=size).map_batches(
        Completer,
        fn_constructor_args=(work, targets),
        fn_constructor_kwargs=arguments,
        udf_modifying_row_count=False,
        **map_options(concurrency, callers, size),
    )


def _rows(batch: pa.Table, columns: Sequence[str] | None) -> list[Mapping[str, Any]]:
    table = batch if columns is None else batch.select(list(columns))
    return list(BlockAccessor.for_block(table).iter_rows(public_row_format=True))


def _harmonic(count: int) -> float:
    """1 + 1/2 + ... + 1/count."""
    return sum(1.0 / k for k in range(1, count + 1))
