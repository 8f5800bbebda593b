"""lm-eval's generation arguments as parameters of a request, and the seed of each request."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import (
    CHOICES,
    FLOORS,
    SAMPLING_PARAMETERS,
    GenerationParams,
)

# Names that harness and engines have for the most tokens of a completion.
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Of one completion in a task's arguments, beside length, sampling and stop strings.
_DRAWN = ("temperature", "top_k", "top_p", "min_p", "seed")
_PENALTIES = ("presence_penalty", "frequency_penalty")
_OWN = ("mode", "max_tokens", "stop", "logit_bias", "provisional", "top_logprobs", *FLOORS)
# What `--param` and the model's arguments may set for all requests.
SETTABLE = tuple(name for name in SAMPLING_PARAMETERS if name not in _OWN)
_WORDS = tuple(name for name in SETTABLE if name in CHOICES)
_SEED_BYTES = 8


def base_params(mode: str, max_tokens: int, given: Mapping[str, Any]) -> GenerationParams:
    """The parameters that a task's arguments start from. Raises InvalidRequestError."""
    for name in given:
        if name not in SETTABLE:
            raise InvalidRequestError("param", name, f"one of {', '.join(SETTABLE)}")
    values: dict[str, Any] = {"mode": mode, "max_tokens": max_tokens, **given}
    return GenerationParams(**values)


def named_values(pairs: Sequence[str]) -> dict[str, int | float | str]:
    """Values by name of NAME=VALUE: numbers, and words of parameters that have a set of them.
    Raises InvalidRequestError for another form."""
    values: dict[str, int | float | str] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if equals and name in _WORDS:
            values[name] = text
            continue
        try:
            values[name] = float(text) if set(text) & set(".eEn") else int(text)
        except ValueError:
            equals = ""
        if not equals:
            raise InvalidRequestError("param", pair, "NAME=NUMBER, as block_size=8") from None
    return values


def request_params(
    base: GenerationParams, arguments: Mapping[str, Any], eos_token_id: int | None
) -> GenerationParams:
    """The parameters of a request with a task's generation arguments; what these do not name is
    `base`'s. Raises InvalidRequestError for an argument that there is no parameter for.

    As in lm-eval a request that does not sample has temperature 0, and one that gives a temperature
    above 0 samples unless `do_sample` is false.
    """
    left = dict(arguments)
    values: dict[str, Any] = {"eos_token_id": eos_token_id}
    values["stop"] = _texts(left.pop("until", ()))
    lengths = [left.pop(name) for name in LENGTHS if left.get(name) is not None]
    if lengths:
        values["max_tokens"] = int(lengths[0])
    samples = left.pop("do_sample", None)
    for name in (*_DRAWN, *_PENALTIES):
        value = left.pop(name, None)
        if value is not None:
            values[name] = value
    if samples is False:
        values["temperature"] = 0.0
    elif samples and "temperature" not in values and base.temperature == 0.0:
        values["temperature"] = 1.0
    unknown = sorted(name for name, value in left.items() if value is not None)
    if unknown:
        known = ", ".join(("until", *LENGTHS, "do_sample", *_DRAWN, *_PENALTIES))
        raise InvalidRequestError(f"generation_kwargs.{unknown[0]}", left[unknown[0]], known)
    return replace(base, **values)


def seeds_of(seed: int, prompts: Sequence[str]) -> list[int]:
    """A seed for each prompt from its text, so that order and batch do not matter; the second time
    that a prompt is asked for it gets another one, and so on."""
    seen: Counter[str] = Counter()
    seeds = []
    for prompt in prompts:
        text = f"{seed}/{seen[prompt]}/{prompt}".encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(text, digest_size=_SEED_BYTES).digest()
        # One bit less than the digest has: seeds are not negative in 64 bits.
        seeds.append(int.from_bytes(digest, "little") >> 1)
        seen[prompt] += 1
    return seeds


def _texts(until: object) -> tuple[str, ...]:
    """Stop strings, of one or of a list; those that say nothing are left out."""
    given = [until] if isinstance(until, str) else until
    if not isinstance(given, list | tuple) or not all(isinstance(text, str) for text in given):
        raise InvalidRequestError("generation_kwargs.until", until, "a text or a list of texts")
    return tuple(dict.fromkeys(text for text in given if text))


def described(params: GenerationParams) -> dict[str, Any]:
    """The parameters that are not the defaults, with the mode, for a report."""
    defaults = {field.name: field.default for field in fields(GenerationParams)}
    return {
        name: getattr(params, name)
        for name in SAMPLING_PARAMETERS
        if name == "mode" or getattr(params, name) != defaults[name]
    }
