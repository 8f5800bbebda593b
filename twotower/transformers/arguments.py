"""The arguments of `generate` as this package's own parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import StoppingCriteriaList

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import MODES, TRAITS, Mode
from twotower.transformers.neutral import GENERATE, check_neutral
from twotower.transformers.rows import Criteria, Decoding, token_ids_of

# As transformers does where nothing says how long an output may be.
DEFAULT_NEW_TOKENS = 20
_LENGTHS = ("max_new_tokens", "max_length")
_FILTERS = ("temperature", "top_k", "top_p", "min_p")
# Values that narrow nothing.
_NO_FILTER: dict[str, tuple[object, ...]] = {
    "temperature": (0, 1),
    "top_k": (0,),
    "top_p": (1,),
    "min_p": (0,),
}
# Knobs of drafts and denoising, and the modes that they matter to.
_KNOBS: dict[str, tuple[Mode, ...]] = {
    "block_size": ("mask_diffusion", "verified", "auto"),
    "confidence_threshold": ("mask_diffusion", "verified", "auto"),
    "steps_per_block": ("mask_diffusion", "auto"),
    "draft_steps": ("verified",),
    "quality": ("auto",),
    "draft_source": ("verified",),
    "acceptance": ("verified",),
    "mix_ratio": ("verified",),
    "commit_rule": ("mask_diffusion", "auto"),
    "first_token": ("mask_diffusion", "auto"),
}


def read_arguments(
    config: TwoTowerConfig, width: int, call: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Decoding:
    """How to decode a batch of prompts [B, width]: what the `call` says by name, then `defaults`.

    None in a call stands for the default, but for `eos_token_id`, where it means that no token
    ends a row. Raises InvalidRequestError for an argument that is not computed here.
    """
    given = {name: value for name, value in call.items() if value is not None}
    values = {**defaults, **given}
    if "eos_token_id" in call:
        values["eos_token_id"] = call["eos_token_id"]
    mode = _mode(values.pop("mode", "ar"))
    streamer, criteria = values.pop("streamer", None), _criteria(values)
    eos = token_ids_of("eos_token_id", values.pop("eos_token_id", config.eos_token_id))
    settings: dict[str, Any] = {"mode": mode, **_lengths(values, given, width)}
    settings |= _draw(values, given) | _knobs(values, mode) | _stop(values)
    check_mask_token(config, values.pop("mask_token_id", None))
    pad, seed = values.pop("pad_token_id", None), values.pop("seed", None)
    check_neutral(values, GENERATE)
    if settings.get("min_tokens") and len(eos) > 1:
        limit = "0 where several tokens end a row"
        raise InvalidRequestError("min_new_tokens", settings["min_tokens"], limit)
    if TRAITS[mode].unit == "token" and (criteria is not None or streamer is not None):
        # Token by token: what is decoded beyond a stop would be lost.
        settings["block_size"] = 1
    return Decoding(settings, eos, pad_token(config, eos, pad), seed, criteria, streamer)


def _mode(value: Any) -> Mode:
    if value not in MODES:
        raise InvalidRequestError("mode", value, f"one of {', '.join(MODES)}")
    mode: Mode = value
    return mode


def check_mask_token(config: TwoTowerConfig, mask_token_id: object) -> None:
    """Raises InvalidRequestError for another mask token than the checkpoint was trained with."""
    if mask_token_id is not None and mask_token_id != config.mask_token_id:
        limit = f"{config.mask_token_id}, the token that the checkpoint was trained with"
        raise InvalidRequestError("mask_token_id", mask_token_id, limit)


def pad_token(config: TwoTowerConfig, eos: Sequence[int], pad: object) -> int:
    """The token that fills a row after its end: `pad`, the checkpoint's, EOS, or 0."""
    given = token_ids_of("pad_token_id", pad)
    return [*given, *token_ids_of("pad_token_id", config.pad_token_id), *eos, 0][0]


def _criteria(values: dict[str, Any]) -> Criteria | None:
    criteria = values.pop("stopping_criteria", None)
    if criteria is None or (isinstance(criteria, list) and not criteria):
        return None
    listed = StoppingCriteriaList(criteria if isinstance(criteria, list) else [criteria])
    return lambda sequences, scores: listed(sequences, scores)


def _lengths(values: dict[str, Any], given: Mapping[str, Any], width: int) -> dict[str, Any]:
    """`max_tokens` and `min_tokens`. A length of the call counts before one of the defaults, and
    `max_new_tokens` before `max_length`."""
    source = given if any(name in given for name in _LENGTHS) else dict(values)
    most, whole = source.get("max_new_tokens"), source.get("max_length")
    for name in _LENGTHS:
        values.pop(name, None)
    if most is None and whole is not None:
        if not isinstance(whole, int) or whole <= width:
            limit = f"more than the {width} tokens of input_ids"
            raise InvalidRequestError("max_length", whole, limit)
        most = whole - width
    least, least_whole = values.pop("min_new_tokens", None), values.pop("min_length", None)
    if least is None and isinstance(least_whole, int):
        least = max(0, least_whole - width)
    most = DEFAULT_NEW_TOKENS if most is None else most
    return {"max_tokens": most} | ({"min_tokens": least} if least else {})


def _draw(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Temperature and filters with do_sample; without it a draw is greedy, and a call that asks for
    both is refused."""
    sample = values.pop("do_sample", None)
    filters = {name: values.pop(name) for name in _FILTERS if name in values}
    if sample:
        if filters.get("top_k") == 0:
            del filters["top_k"]
        return {"temperature": 1.0, **filters}
    for name in _FILTERS:
        if name in given and given[name] not in _NO_FILTER[name]:
            raise InvalidRequestError(name, given[name], "none without do_sample=True")
    return {"temperature": 0.0}


def _knobs(values: dict[str, Any], mode: Mode) -> dict[str, Any]:
    found = {name: values.pop(name) for name in _KNOBS if name in values}
    for name, value in found.items():
        if mode not in _KNOBS[name]:
            raise InvalidRequestError(name, value, f"none in mode {mode}")
    return found


def _stop(values: dict[str, Any]) -> dict[str, Any]:
    """Stop strings; `tokenizer`, which transformers wants beside them, is the checkpoint's."""
    stop = values.pop("stop_strings", None)
    values.pop("tokenizer", None)
    if stop is None:
        return {}
    return {"stop": [stop] if isinstance(stop, str) else stop}
