"""Bodies of requests to the HTTP front, from prompts and sampling parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SAMPLING_PARAMETERS, SEED_BITS, GenerationParams

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
# Fields that a pipeline sets, or cannot answer in one row.
_NOT_HERE = {
    "prompt": "in a column or of a function (prompt=)",
    "messages": "in a column or of a function (prompt=)",
    "stream": "left out: rows are answered whole",
    "stream_options": "left out: rows are answered whole",
    "provisional": "left out: rows are answered whole",
    "n": "left out: a row has one completion",
    "best_of": "left out: a row has one completion",
}
_PROMPT = "a text, token ids or messages (mappings with role and content)"


@dataclass(frozen=True)
class PostedRow:
    """A request: `url` is the path, `body` what is posted there."""

    url: str
    body: dict[str, Any]


def row_seed(seed: int, key: str) -> int:
    """The seed, 0 to 2^63 - 1, of what is called `key` in a pipeline with that seed.

    It depends on nothing else, as on the order or the number of rows. Rows of a batch job have
    theirs by the same rule.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> (64 - SEED_BITS)


def checked_params(params: Mapping[str, Any] | GenerationParams | None) -> dict[str, Any]:
    """The body's fields for `params`, under the names of the HTTP front.

    A mapping has these names already, and what it leaves out is the service's default. A
    GenerationParams is sent whole, with its own defaults: without an `eos_token_id` nothing but its
    length or a stop string ends an output, and with one that is the model's. Raises
    InvalidRequestError.
    """
    if isinstance(params, GenerationParams):
        return _fields_of(params)
    fields = dict(params or {})
    for name in fields:
        if name in _NOT_HERE and fields[name] is not None:
            raise InvalidRequestError(f"params.{name}", fields[name], _NOT_HERE[name])
    try:
        json.dumps(fields)
    except (TypeError, ValueError):
        raise InvalidRequestError("params", fields, "values that JSON can hold") from None
    return fields


def posted(prompt: Any, params: Mapping[str, Any]) -> PostedRow:
    """The request that asks for the completion of a prompt, or the answer to a conversation.

    Raises InvalidRequestError for what is neither.
    """
    if isinstance(prompt, str):
        return PostedRow(COMPLETIONS, {**params, "prompt": prompt})
    items = list(prompt) if _is_sequence(prompt) else []
    if items and all(isinstance(item, Mapping) for item in items):
        # Arrow fills up fields that only some messages have.
        kept = [{name: item[name] for name in item if item[name] is not None} for item in items]
        return PostedRow(CHAT, {**_for_chat(params), "messages": kept})
    if items and all(_is_id(item) for item in items):
        return PostedRow(COMPLETIONS, {**params, "prompt": [int(item) for item in items]})
    raise InvalidRequestError("prompt", prompt, _PROMPT)


def prompt_key(request: PostedRow) -> str:
    """What a prompt without an id is called: its text, or its ids or messages as JSON."""
    prompt = request.body.get("prompt", request.body.get("messages"))
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _fields_of(params: GenerationParams) -> dict[str, Any]:
    given = {name: getattr(params, name) for name in SAMPLING_PARAMETERS}
    if given.pop("provisional"):
        raise InvalidRequestError("params.provisional", True, _NOT_HERE["provisional"])
    given["stop"] = list(params.stop) or None
    given["logit_bias"] = {str(token): bias for token, bias in params.logit_bias} or None
    given["logprobs"] = given.pop("top_logprobs") or None
    given["ignore_eos"] = params.eos_token_id is None
    return {name: value for name, value in given.items() if value is not None}


def _for_chat(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """The number of log-probabilities has another name there."""
    count = params.get("logprobs")
    if count is None or isinstance(count, bool):
        return params
    return {**params, "logprobs": True, "top_logprobs": count}


def _is_sequence(given: Any) -> bool:
    # numpy's arrays, which columns of lists may come as, are no Sequence.
    array = hasattr(given, "tolist") and getattr(given, "ndim", 0) == 1
    return array or (isinstance(given, Sequence) and not isinstance(given, bytes))


def _is_id(given: Any) -> bool:
    return hasattr(given, "__index__") and not isinstance(given, bool)
