"""Completions as a transformation of a user's own Ray Data pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from ray.data import Dataset

from twotower.data.bodies import checked_params
from twotower.data.columns import ERROR, INCLUDABLE, CompletionColumns, Prompt
from twotower.data.completer import complete
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams

ON_ERROR = ("raise", "column")


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
    patience_s: float = 600.0,
) -> Dataset:
    """`ds` with the completion of each row's prompt in a column `output`; evaluated lazily.

    All other columns stay. `target`: HTTP address or addresses of a running service. `prompt`: a
    column, or a function of a row (column -> value), that holds a text, token ids, or the messages
    of a conversation. `params`: fields of the HTTP front's bodies, as `max_tokens` and `mode`
    (docs/http.md), or a GenerationParams, which is sent whole: without an `eos_token_id` it goes on
    after the end-of-text token, as in process.

    `include`: further columns, of finish_reason, stop_reason, token_ids, prompt_tokens,
    completion_tokens, nfe (denoiser passes), context_passes, cached_tokens, accepted_tokens and
    drafted_tokens, lookup_accepted_tokens and lookup_drafted_tokens (their parts of lookups), seed,
    request_id and response (the whole answer as JSON).

    Each row has a seed of its own, made of `seed` and its value in `id_column`, or of `seed` and
    the prompt where there is no such column: equal prompts then have equal completions. So a row's
    text depends neither on the order of rows nor on interruptions. A seed in `params` is used for
    all rows.

    `concurrency` rows are in flight for each of the pool's actors, of which there are `callers` =
    (least, most). What is busy, or gone for a while, is tried again for `patience_s` seconds a row.
    With `on_error` "raise" a row without a completion then ends the pipeline: Ray's error has the
    RowFailedError, which names the row's id, in its text. With "column" the column `error` has
    OpenAI's error as JSON, null where it went well, and the other columns are null. `api_key` None
    means the environment's TWOTOWER_API_KEY.

    Order of rows is Ray Data's. Raises InvalidRequestError for arguments out of their limits.
    """
    names = list(INCLUDABLE)
    for index, name in enumerate(include):
        if name not in names:
            raise InvalidRequestError(f"include[{index}]", name, f"one of {', '.join(names)}")
    if on_error not in ON_ERROR:
        raise InvalidRequestError("on_error", on_error, f"one of {', '.join(ON_ERROR)}")
    if output in (*include, ERROR):
        raise InvalidRequestError("output", output, "a name that no other new column has")
    work = CompletionColumns(
        prompt=prompt,
        params=checked_params(params),
        output=output,
        include=tuple(dict.fromkeys(include)),
        id_column=id_column,
        seed=seed,
        raises=on_error == "raise",
    )
    return complete(
        ds,
        work,
        target,
        concurrency=concurrency,
        callers=callers,
        api_key=api_key,
        patience_s=patience_s,
    )
