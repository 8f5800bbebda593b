"""Bodies: what they are made of, and that the HTTP front takes each of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from twotower import GenerationParams
from twotower.data.bodies import CHAT, COMPLETIONS, checked_params, posted, prompt_key, row_seed
from twotower.deployments.http.bodies import ChatBody, CompletionBody
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SAMPLING_PARAMETERS

EVERYTHING = GenerationParams(
    mode="verified",
    max_tokens=33,
    block_size=8,
    steps_per_block=7,
    confidence_threshold=0.5,
    temperature=0.7,
    top_k=9,
    top_p=0.9,
    min_p=0.05,
    seed=11,
    draft_steps=2,
    min_tokens=3,
    stop=("\n\n", "end"),
    min_steps_per_block=2,
    min_confidence_threshold=0.25,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    logit_bias=((5, 1.5), (7, -2.0)),
    top_logprobs=4,
    quality="near",
    draft_source="lookup",
    acceptance="mix",
    mix_ratio=0.5,
    commit_rule="product",
    first_token="denoiser",
)
CONVERSATION = [{"role": "user", "content": "hello"}]


def test_parameters_arrive_as_they_are() -> None:
    body = CompletionBody(**posted("text", checked_params(EVERYTHING)).body)
    assert body.max_tokens is not None
    assert body.params(body.max_tokens, body.logprobs or 0, 2) == EVERYTHING
    changed = [
        name
        for name in SAMPLING_PARAMETERS
        if getattr(EVERYTHING, name) != getattr(GenerationParams(), name)
    ]
    # All but the one that only a stream has.
    assert set(changed) == set(SAMPLING_PARAMETERS) - {"provisional"}


def test_parameters_of_a_conversation_arrive_too() -> None:
    request = posted(CONVERSATION, checked_params(EVERYTHING))
    body = ChatBody(**request.body)
    assert request.url == CHAT
    assert body.max_tokens is not None
    assert body.logprobs
    assert body.params(body.max_tokens, body.top_logprobs or 0, 2) == EVERYTHING


def test_the_end_of_text_ends_what_it_ends_in_process() -> None:
    for params, expected in (
        (GenerationParams(seed=1), None),
        (GenerationParams(seed=1, eos_token_id=2), 2),
        ({"seed": 1}, 2),
    ):
        body = CompletionBody(**posted("text", checked_params(params)).body)
        assert body.params(4, 0, 2).eos_token_id == expected


@pytest.mark.parametrize("prompt", [[5, 6, 7], (5, 6, 7), np.array([5, 6, 7])])
def test_ids_are_a_prompt(prompt: Any) -> None:
    request = posted(prompt, {})
    assert (request.url, CompletionBody(**request.body).prompt) == (COMPLETIONS, [5, 6, 7])


def test_messages_as_arrow_gives_them() -> None:
    """A column of structs has every field in every message."""
    messages = np.array([{"role": "user", "content": "a", "name": None}], dtype=object)
    request = posted(messages, {"max_tokens": 2})
    assert request.body["messages"] == [{"role": "user", "content": "a"}]
    ChatBody(**request.body)


@pytest.mark.parametrize("prompt", [None, 5, 1.5, [], ["a"], [1.5], [True], b"bytes", [[1]], {}])
def test_what_is_no_prompt(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: got .*, expected a text, token ids"):
        posted(prompt, {})


@pytest.mark.parametrize(
    "params",
    [{"stream": True}, {"n": 2}, {"prompt": "a"}, {"messages": CONVERSATION}, {"best_of": 1}],
)
def test_fields_that_a_row_cannot_have(params: dict[str, Any]) -> None:
    (name,) = params
    with pytest.raises(InvalidRequestError, match=rf"^params\.{name}: got "):
        checked_params(params)


def test_values_that_json_cannot_hold() -> None:
    with pytest.raises(InvalidRequestError, match="values that JSON can hold"):
        checked_params({"stop": {1, 2}})


def test_a_seed_belongs_to_a_name() -> None:
    seeds = {row_seed(seed, key) for seed in range(50) for key in ("a", "b", "a:b", "", "\ud800")}
    assert len(seeds) == 250
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Kept for good, as the same pipeline has to give the same texts: `b2sum -l 64` of "0:row"
    # without its last bit. A batch job's rows have the same seeds.
    assert row_seed(0, "row") == 6100083846322476688


def test_a_prompt_without_a_name_is_its_own() -> None:
    assert prompt_key(posted("text", {})) == "text"
    assert prompt_key(posted([1, 2], {})) == "[1, 2]"
    one, other = (posted([message], {}) for message in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
    assert prompt_key(one) == prompt_key(other)
