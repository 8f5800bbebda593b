"""Completions as a transformation of a user's own Ray Data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from twotower.towers.request.params import GenerationParams

if TYPE_CHECKING:
    from ray.data import Dataset

Prompt = str | Sequence[Mapping[str, Any]]


def completions(
    ds: Dataset,
    *,
    target: str | Sequence[str],
    prompt: str | Callable[[dict[str, Any]], Prompt] = "prompt",
    params: Mapping[str, Any] | GenerationParams | None = None,
    output: str = "text",
    include: Sequence[str] = ("finish_reason", "completion_tokens"),
    id_column: str | None = None,
    seed: int = 0,
    concurrency: int = 64,
    callers: int | tuple[int, int] = (1, 4),
    on_error: Literal["raise", "column"] = "raise",
    api_key: str | None = None,
) -> Dataset:
    """`ds` with the completion of each row's prompt in the column `output`; evaluated lazily."""
    raise NotImplementedError
