"""What a client makes of messages; the wire itself is in test_client."""

from __future__ import annotations

import pickle
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from twotower.client.messages import (
    ServiceError,
    Usage,
    generate_request,
    model_info_of,
    score_request,
    text_block,
)
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.errors import InvalidRequestError


def test_an_error_survives_a_process_border() -> None:
    error = ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full; retry after 2 s")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.details, copy.retry_after_s) == (error.code, error.details, 2.0)
    assert str(copy) == "RESOURCE_EXHAUSTED: full; retry after 2 s"


def test_costs_of_a_broken_stream_are_added() -> None:
    broken, rest = Usage(3, 8, 20, 2, 1, 5, 9, 4, 6), Usage(3, 30, 40, 6, 3, 7, 11, 1, 2)
    assert rest.after(None) == rest
    # The prompt and what was spared of it count once, the output is the last stream's.
    assert rest.after(broken) == Usage(3, 30, 60, 8, 1, 12, 20, 5, 8)


def test_what_is_not_given_stays_unset() -> None:
    request = generate_request("x", ["a"], [4], "r", {"seed": 0, "top_k": None, "mode": "ar"})
    assert {field.name for field, _ in request.sampling_params.ListFields()} == {
        "seed",
        "mode",
        "stop",
    }
    assert (request.text, list(request.generated_token_ids), request.request_id) == ("x", [4], "r")
    assert list(generate_request([5, 6], (), (), "", {}).tokens.ids) == [5, 6]


def test_blocks_are_numbered_within_the_completion() -> None:
    block = text_block(pb.Block(index=0, start=9, token_ids=[4], text="a"), 7)
    assert (block.index, block.start, block.token_ids, block.text) == (7, 9, (4,), "a")


@pytest.mark.parametrize("eos", [None, 0])
def test_a_model_may_lack_an_end_token(eos: int | None) -> None:
    assert model_info_of(pb.ModelInfo(name="m", eos_token_id=eos)).eos_token_id == eos


@pytest.mark.parametrize(
    "ids",
    [[5, 6], np.array([5, 6]), torch.tensor([[5, 6]]), [np.int32(5), torch.tensor(6)]],
    ids=lambda ids: type(ids).__name__,
)
def test_ids_are_lists_arrays_or_tensors(ids: Any) -> None:
    request = generate_request(ids, (), ids, "", {})
    assert list(request.tokens.ids) == list(request.generated_token_ids) == [5, 6]
    assert list(score_request(ids).tokens.ids) == [5, 6]


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([5, True], r"\[1\]: got True, expected an id in 0\.\.2147483647"),
        ([1.0], r"\[0\]: got 1\.0"),
        (torch.tensor([3.0]), r"\[0\]: got 3\.0"),
        ([5, -1], r"\[1\]: got -1"),
        ([2**31], r"\[0\]: got 2147483648"),
        ([[1]], r"\[0\]: got \[1\]"),
        (torch.zeros(2, 2).long(), r": got 'an array of shape \[2, 2\]'"),
        (None, ": got None"),
        (7, ": got 7"),
        (b"ab", ": got b'ab'"),
    ],
)
def test_what_no_service_could_take_is_not_sent(ids: Any, named: str) -> None:
    for field in ("prompt", "generated_token_ids"):
        parts = (ids, [1]) if field == "prompt" else ([1], ids)
        with pytest.raises(InvalidRequestError, match=f"^{field}{named}"):
            generate_request(parts[0], (), parts[1], "", {})
    with pytest.raises(InvalidRequestError, match=f"^text{named}"):
        score_request(ids)


def test_a_text_that_no_wire_has() -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt\[1\]: .*without lone surrogates"):
        generate_request("a\ud83d", (), (), "", {})
    with pytest.raises(InvalidRequestError, match=r"^text\[1\]: .*without lone surrogates"):
        score_request("a\ud83d")


def test_numbers_of_other_libraries() -> None:
    given = {"max_tokens": np.int64(9), "seed": torch.tensor(2**40), "top_p": np.float64(0.5)}
    given |= {"temperature": torch.tensor(0.5), "ignore_eos": np.bool_(True), "min_p": 0}
    params = generate_request("x", (), (), "", given).sampling_params
    assert (params.max_tokens, params.seed, params.top_p) == (9, 2**40, 0.5)
    assert (params.temperature, params.ignore_eos, params.min_p) == (0.5, True, 0.0)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_tokens", True, "a whole number of at least -2147483648, at most 2147483647"),
        ("max_tokens", 2.5, "a whole number"),
        ("max_tokens", np.float32(2), "a whole number"),
        ("max_tokens", 2**31, "a whole number of at least -2147483648, at most 2147483647"),
        ("top_k", "5", "a whole number"),
        ("seed", 2**63, "a whole number of .* at most 9223372036854775807"),
        ("seed", np.array([1]), "a whole number"),
        ("temperature", True, "a number"),
        ("temperature", "hot", "a number"),
        ("ignore_eos", 1, "True or False"),
        ("logprobs", "yes", "True or False"),
        ("mode", 3, "a text"),
        ("mode", True, "a text"),
    ],
)
def test_a_parameter_of_another_type_is_named(name: str, value: object, expected: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}: got .*, expected {expected}"):
        generate_request("x", (), (), "", {name: value})
