"""The step of a Ray Data pipeline that asks a service about every row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from twotower.data.caller import Answer

if TYPE_CHECKING:
    import pyarrow as pa
    from ray.data import Dataset


class Request(Protocol):
    """What is posted for a row: `url` is the path, e.g. "/v1/completions"."""

    @property
    def url(self) -> str: ...
    @property
    def body(self) -> Mapping[str, Any]: ...


class RowWork(Protocol):
    """What a pipeline makes of rows and answers. It is pickled to the actors.

    Methods are called in an actor, one at a time. An exception of `row_errors` out of `to_request`
    makes the row an error row (`to_error`) and no request; any other exception ends the pipeline.
    """

    row_errors: tuple[type[Exception], ...]

    def to_request(self, row: Mapping[str, Any]) -> Request:
        """The request of a row (column -> value)."""
        ...

    def to_output(self, row: Mapping[str, Any], request: Any, answer: Answer) -> dict[str, Any]:
        """The output of a row that was answered, well or not. `request` is that of to_request."""
        ...

    def to_error(self, row: Mapping[str, Any], error: Exception) -> dict[str, Any]:
        """The output of a row that made no request."""
        ...

    def to_table(self, batch: pa.Table, outputs: Sequence[dict[str, Any]]) -> pa.Table:
        """The step's result: the outputs of a batch's rows, in the batch's order."""
        ...


class Meter(Protocol):
    """Takes counts of what was done since the last call: rows, errors, tokens, passes,
    context_passes, retries, in_flight. At most about one call a second and actor."""

    def add(self, **counts: int) -> None: ...


class Completer:
    """Callable class for `Dataset.map_batches`, with `batch_format="pyarrow"`."""

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
        raise NotImplementedError

    async def __call__(self, batch: pa.Table) -> pa.Table:
        raise NotImplementedError


def map_options(
    concurrency: int, callers: int | tuple[int, int], batch_size: int
) -> dict[str, Any]:
    """Arguments of `Dataset.map_batches` that keep `concurrency` rows of each actor in flight."""
    raise NotImplementedError


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
    """`ds` cut into blocks of `batch_size` rows, and mapped by a Completer with `map_options`.

    What both `completions` and a batch job use; output blocks have `batch_size` rows.
    """
    raise NotImplementedError
