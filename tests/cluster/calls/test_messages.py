"""Calls and answers as messages: what goes in comes out, and nothing else is taken."""

from __future__ import annotations

import pickle
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from twotower.cluster.calls import messages
from twotower.cluster.calls.messages import Failure, packed_arguments, packed_value
from twotower.cluster.services.tower_services import ROW_CALLS
from twotower.towers import errors
from twotower.towers.decoding.services import (
    Block,
    BlockTiming,
    DraftCosts,
    DraftScores,
    Extended,
    PassTime,
    Prefilled,
    Token,
)
from twotower.towers.errors import InvalidRequestError, TwoTowerError
from twotower.towers.request.params import GenerationParams

PARAMS = GenerationParams(
    mode="verified", seed=2**63 - 1, stop=("a", "é"), logit_bias=((3, -1.5), (9, 2.0)), top_k=4
)
SCORES = DraftScores(torch.tensor([[1, 2], [3, 4]]), torch.tensor([[0.5, -1.0], [0.0, -9.5]]))
CALLS = {
    "TowerService.release": ("row",),
    "ContextTowerService.open": ("row", 64),
    "DenoiserTowerService.open": ("row", 64),
    "ContextTowerService.open_for": ("row", 64, 1),
    "ContextTowerService.move": ("row", 1),
    "ContextTowerService.prefill": ("row", (1, 2), (), PARAMS),
    "ContextTowerService.extend": ("row", (1, 2), PARAMS, (7,)),
    "ContextTowerService.decode": ("row", 16, PARAMS, (), DraftCosts(0.5, None)),
    "ContextTowerService.update_mirror": ("row",),
    "ContextTowerService.verify": ("row", (1, 2), PARAMS, (), None),
    "DenoiserTowerService.denoise_block": ("row", 3, PARAMS, (7,), (), None),
    "DenoiserTowerService.next_token": ("row", 3, 7, PARAMS, ()),
}
TOP = ((1, -0.1), (2, -2.5))
BLOCK = Block(
    3,
    (1, 2),
    (0, 1),
    (0.1, 1e-30),
    nfe=2,
    finish_reason="stop",
    log_probs=(-2.3, -69.0),
    top_log_probs=(TOP, TOP),
    drafted_by="lookup",
    next_draft="whole",
)
VALUES: list[tuple[str, object]] = [
    ("TowerService.release", None),
    ("ContextTowerService.open", 5),
    ("DenoiserTowerService.open", None),
    ("ContextTowerService.prefill", Prefilled(2, 64, Token(5, 0.5, -0.7, TOP))),
    ("ContextTowerService.extend", Extended(1)),
    ("ContextTowerService.decode", BLOCK),
]


def test_every_call_is_tried_here() -> None:
    assert all(call in ROW_CALLS for call in CALLS)
    assert "ContextTowerService.score" not in ROW_CALLS
    assert len(CALLS) == len(ROW_CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_arguments_come_as_they_were(call: str) -> None:
    assert ROW_CALLS.arguments(call, packed_arguments(CALLS[call])) == list(CALLS[call])


@pytest.mark.parametrize(("call", "value"), VALUES)
def test_values_come_as_they_were(call: str, value: object) -> None:
    assert ROW_CALLS.value(call, packed_value(value)) == value


@given(st.floats(0.0, 1.0), st.integers(0, 2**63 - 1), st.booleans())
def test_numbers_of_parameters_keep_every_bit(number: float, seed: int, provisional: bool) -> None:
    params = GenerationParams(
        confidence_threshold=number, temperature=number, seed=seed, provisional=provisional
    )
    call = ("row", (1,), (), params)
    assert ROW_CALLS.arguments("ContextTowerService.prefill", packed_arguments(call))[3] == params


def test_scores_and_times_of_a_draft_keep_their_bits() -> None:
    call = ("row", (1, 2), PARAMS, (), SCORES)
    came = ROW_CALLS.arguments("ContextTowerService.verify", packed_arguments(call))[4]
    assert torch.equal(came.token_ids, SCORES.token_ids)
    assert torch.equal(came.scores, SCORES.scores)
    passes, timing = (PassTime(0.1, 16, 2),), BlockTiming(1e9 + 0.125, commit_s=0.3)
    sent = Block(0, (), (), (), 0, draft_scores=SCORES, passes=passes, timing=timing)
    block = ROW_CALLS.value("ContextTowerService.verify", packed_value(sent))
    assert (block.passes, block.timing) == (passes, timing)
    assert torch.equal(block.draft_scores.scores, SCORES.scores)


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("ContextTowerService.open", ("row",)),
        ("ContextTowerService.open", ("row", "64")),
        ("ContextTowerService.open", ("row", 64, 1)),
        ("ContextTowerService.extend", ("row", (1, 2.5), PARAMS, ())),
        ("ContextTowerService.extend", ("row", (1, 2), None, ())),
    ],
)
def test_other_arguments_are_refused(call: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(msgspec.ValidationError):
        ROW_CALLS.arguments(call, packed_arguments(arguments))


def test_a_pickle_is_not_run() -> None:
    content = msgspec.Raw(pickle.dumps(("row", 64)))
    with pytest.raises(msgspec.MsgspecError):
        ROW_CALLS.arguments("ContextTowerService.open", content)


@pytest.mark.parametrize(
    "kind",
    [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, TwoTowerError)
    ],
)
def test_errors_come_as_they_were(kind: Any) -> None:
    given = ("seed", -1, "0 or more") if kind is InvalidRequestError else ("no room",)
    error = kind(*given)
    came = Failure.of(error).error()
    assert type(came) is kind
    assert str(came) == str(error)


def test_a_value_that_has_no_message_is_shown() -> None:
    came = Failure.of(InvalidRequestError("stop", [None], "strings")).error()
    assert str(came) == "stop: got '[None]', expected strings"


@pytest.mark.parametrize(
    "value", [2**63, -(2**70), 10**500], ids=["64 bits", "70 bits", "many digits"]
)
def test_a_number_that_no_message_holds_is_shown(value: int) -> None:
    came = Failure.of(InvalidRequestError("seed", value, "less")).error()
    packed_value(Failure.of(InvalidRequestError("seed", value, "less")))
    assert isinstance(came, InvalidRequestError)
    assert came.field == "seed"


def test_a_draft_without_tokens_has_scores_without_lines() -> None:
    none = DraftScores(torch.zeros(0, 64, dtype=torch.int64), torch.zeros(0, 64))
    call = ("row", (), PARAMS, (), none)
    came = ROW_CALLS.arguments("ContextTowerService.verify", packed_arguments(call))[4]
    assert came.scores.shape == (0, 64)


def test_a_tensor_of_another_kind_has_no_message() -> None:
    with pytest.raises(TypeError, match=r"torch\.bfloat16 has no message"):
        packed_value(torch.zeros(2, dtype=torch.bfloat16))


def test_long_parameters_are_not_kept() -> None:
    params = GenerationParams(logit_bias=tuple((token, 1.0) for token in range(1000)), seed=1)
    before = messages._kept_bytes.cache_info().currsize, messages._kept_params.cache_info().currsize
    call = ("row", (1,), (), params)
    assert ROW_CALLS.arguments("ContextTowerService.prefill", packed_arguments(call))[3] == params
    after = messages._kept_bytes.cache_info().currsize, messages._kept_params.cache_info().currsize
    assert after == before


def test_other_errors_keep_their_text() -> None:
    came = Failure.of(ZeroDivisionError("by zero")).error()
    assert type(came) is RuntimeError
    assert str(came) == "ZeroDivisionError: by zero"
