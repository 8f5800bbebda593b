"""What a client makes of messages; the wire itself is in test_client."""

from __future__ import annotations

import pickle

import grpc
import pytest

from twotower.messages import ServiceError, Usage, generate_request, model_info_of, text_block
from twotower.protos.v1 import generation_pb2 as pb


def test_an_error_survives_a_process_border() -> None:
    error = ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, "full; retry after 2 s")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.code, copy.details, copy.retry_after_s) == (error.code, error.details, 2.0)
    assert str(copy) == "RESOURCE_EXHAUSTED: full; retry after 2 s"


def test_costs_of_a_broken_stream_are_added() -> None:
    broken, rest = Usage(3, 8, 20, 2, 1, 5, 9), Usage(3, 30, 40, 6, 3, 7, 11)
    assert rest.after(None) == rest
    # The prompt and what was spared of it count once, the output is the last stream's.
    assert rest.after(broken) == Usage(3, 30, 60, 8, 1, 12, 20)


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
