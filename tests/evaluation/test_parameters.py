"""A task's generation arguments as parameters, and seeds."""

from __future__ import annotations

from typing import Any

import pytest

from twotower.evaluation.parameters import (
    base_params,
    described,
    named_values,
    request_params,
    seeds_of,
)
from twotower.towers.errors import InvalidRequestError

BASE = base_params("verified", 100, {"draft_steps": 2})


def test_arguments_become_parameters() -> None:
    given = {"until": ["\n", "", "\n"], "max_gen_toks": 7, "do_sample": True, "top_p": 0.9}
    params = request_params(BASE, given, 2)
    assert (params.mode, params.draft_steps) == ("verified", 2)
    assert (params.stop, params.max_tokens, params.eos_token_id) == (("\n",), 7, 2)
    assert (params.temperature, params.top_p) == (1.0, 0.9)


@pytest.mark.parametrize(
    ("arguments", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.3}, 0.3),
        ({"temperature": 0.3}, 0.3),
        ({"do_sample": None, "temperature": None}, 0.0),
    ],
)
def test_who_samples(arguments: dict[str, Any], temperature: float) -> None:
    assert request_params(BASE, arguments, None).temperature == temperature


def test_a_base_temperature_holds_where_the_task_says_nothing() -> None:
    warm = base_params("ar", 8, {"temperature": 0.5})
    assert request_params(warm, {}, None).temperature == 0.5
    assert request_params(warm, {"do_sample": True}, None).temperature == 0.5
    assert request_params(warm, {"do_sample": False}, None).temperature == 0.0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_beams": 4}, "generation_kwargs.num_beams: got 4"),
        ({"until": 5}, "generation_kwargs.until: got 5"),
        ({"until": ["a", 5]}, "generation_kwargs.until"),
        ({"until": [str(n) for n in range(17)]}, "stop: got '17 strings'"),
        ({"top_p": 1.5}, "top_p: got 1.5"),
        ({"max_new_tokens": 0}, "max_tokens: got 0"),
    ],
)
def test_arguments_without_a_parameter_are_errors(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text.replace("(", "\\(")):
        request_params(BASE, arguments, None)


def test_names_of_the_command_line() -> None:
    assert named_values(["block_size=8", "confidence_threshold=0.9", "top_p=1e-1"]) == {
        "block_size": 8,
        "confidence_threshold": 0.9,
        "top_p": 0.1,
    }
    words = named_values(["acceptance=mix", "mix_ratio=0.5", "first_token=context"])
    mixed = base_params("verified", 8, words)
    assert (mixed.mix, mixed.first_token) == (0.5, "context")
    with pytest.raises(InvalidRequestError, match="quality: got 'best', expected one of ar, near"):
        base_params("auto", 8, named_values(["quality=best"]))
    for wrong in ("block_size", "block_size=", "block_size=x", "quality", "mode=ar"):
        with pytest.raises(InvalidRequestError, match="NAME=NUMBER"):
            named_values([wrong])
    with pytest.raises(InvalidRequestError, match="param: got 'stop'"):
        base_params("ar", 8, {"stop": "x"})


def test_seeds_belong_to_prompts() -> None:
    first = seeds_of(0, ["a", "b", "a"])
    assert len(set(first)) == 3
    assert seeds_of(0, ["b", "a", "a"]) == [first[1], first[0], first[2]]
    assert seeds_of(1, ["a"]) != first[:1]
    assert all(0 <= seed < 2**63 for seed in seeds_of(0, [str(n) for n in range(50)]))


def test_a_report_names_what_is_not_the_default() -> None:
    assert described(BASE) == {"mode": "verified", "max_tokens": 100, "draft_steps": 2}
