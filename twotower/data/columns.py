"""Completions as columns beside those of the rows that they belong to."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from twotower.data.bodies import PostedRow, posted, prompt_key, row_seed
from twotower.data.caller import Answer
from twotower.towers.errors import InvalidRequestError, TwoTowerError, cut_off

ERROR = "error"
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


class RowFailedError(TwoTowerError):
    """A row has no completion, and the pipeline was to end with it."""


@dataclass(frozen=True)
class CompletionColumns:
    """The RowWork of `twotower.data.completions`, whose arguments it has."""

    prompt: str | Callable[[dict[str, Any]], Prompt]
    params: Mapping[str, Any]
    output: str
    include: tuple[str, ...]
    id_column: str | None
    seed: int
    raises: bool

    row_errors = (InvalidRequestError,)

    @property
    def columns(self) -> Sequence[str] | None:
        """Those with prompt and id; all of them for a function."""
        if not isinstance(self.prompt, str):
            return None
        return [self.prompt] if self.id_column is None else [self.prompt, self.id_column]

    def to_request(self, row: Mapping[str, Any]) -> PostedRow:
        """The request of a row. Raises InvalidRequestError for a prompt that is none."""
        prompt = row[self.prompt] if isinstance(self.prompt, str) else self.prompt(dict(row))
        request = posted(prompt, self.params)
        if "seed" not in request.body:
            key = prompt_key(request) if self.id_column is None else str(row[self.id_column])
            request.body["seed"] = row_seed(self.seed, key)
        if "token_ids" in self.include:
            request.body["return_token_ids"] = True
        return request

    def to_output(
        self, row: Mapping[str, Any], request: PostedRow, answer: Answer
    ) -> dict[str, Any]:
        """The row's new columns. Raises RowFailedError for an error that is not to be a column."""
        if not answer.ok:
            return self._failed(row, {**answer.body["error"], "status": answer.status})
        choice = answer.body["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
        further = {name: INCLUDABLE[name][1](answer, request) for name in self.include}
        return {self.output: text, **further, ERROR: None}

    def to_error(self, row: Mapping[str, Any], error: InvalidRequestError) -> dict[str, Any]:
        """The row's new columns. Raises RowFailedError as to_output."""
        named = {"message": str(error), "param": error.field, "code": None}
        return self._failed(row, {**named, "type": "invalid_request_error", "status": 0})

    def to_table(self, batch: pa.Table, outputs: Sequence[dict[str, Any]]) -> pa.Table:
        """The batch with its new columns. Raises InvalidRequestError for a name that it has."""
        types = {self.output: pa.string()} | {name: INCLUDABLE[name][0] for name in self.include}
        if not self.raises:
            types[ERROR] = pa.string()
        for name, kind in types.items():
            if name in batch.column_names:
                raise InvalidRequestError("output", name, "a column that the data set has not")
            values = pa.array([output.get(name) for output in outputs], kind)
            batch = batch.append_column(name, values)
        return batch

    def _failed(self, row: Mapping[str, Any], error: dict[str, Any]) -> dict[str, Any]:
        if self.raises:
            of = "" if self.id_column is None else f" {cut_off(str(row[self.id_column]), 80)}"
            raise RowFailedError(f"row{of}: status {error['status']}: {error['message']}")
        return {ERROR: json.dumps(error)}


def _usage(*path: str) -> Callable[[Answer, PostedRow], Any]:
    def read(answer: Answer, _: PostedRow) -> Any:
        found: Any = answer.body.get("usage")
        for name in path:
            found = found.get(name) if found else None
        return found

    return read


def _choice(name: str) -> Callable[[Answer, PostedRow], Any]:
    return lambda answer, _: answer.body["choices"][0].get(name)


# What may be asked for beside the text: its type, and where it is found.
INCLUDABLE: dict[str, tuple[pa.DataType, Callable[[Answer, PostedRow], Any]]] = {
    "finish_reason": (pa.string(), _choice("finish_reason")),
    "stop_reason": (pa.string(), _choice("stop_reason")),
    "token_ids": (pa.list_(pa.int64()), _choice("token_ids")),
    "prompt_tokens": (pa.int64(), _usage("prompt_tokens")),
    "completion_tokens": (pa.int64(), _usage("completion_tokens")),
    "nfe": (pa.int64(), _usage("twotower", "nfe")),
    "context_passes": (pa.int64(), _usage("twotower", "context_passes")),
    "cached_tokens": (pa.int64(), _usage("twotower", "cached_tokens")),
    "accepted_tokens": (pa.int64(), _usage("twotower", "accepted_tokens")),
    "drafted_tokens": (pa.int64(), _usage("twotower", "drafted_tokens")),
    "lookup_accepted_tokens": (pa.int64(), _usage("twotower", "lookup_accepted_tokens")),
    "lookup_drafted_tokens": (pa.int64(), _usage("twotower", "lookup_drafted_tokens")),
    "seed": (pa.int64(), lambda _, request: request.body["seed"]),
    "request_id": (pa.string(), lambda answer, _: answer.request_id),
    "response": (pa.string(), lambda answer, _: json.dumps(answer.body)),
}
