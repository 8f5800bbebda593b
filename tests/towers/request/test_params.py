"""What a request may ask for: every field with its limit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams, row_key

NAN, INF = math.nan, math.inf
HUGE = 10**400
WHOLE = [True, False, 1.0, 1.5, "1", None, NAN, [1]]
BAD: dict[str, tuple[list[Any], str]] = {
    "mode": (["", "verify", None, 3, ["ar"], "AR"], "one of mask_diffusion, ar, mock_ar, verified"),
    "max_tokens": ([0, -1, *WHOLE], "at least 1"),
    "block_size": ([0, -1, 257, *WHOLE], "at least 1, at most 256"),
    "steps_per_block": ([0, -1, *WHOLE], "at least 1"),
    "confidence_threshold": (
        [-0.01, 1.01, NAN, INF, -INF, True, "0.5", None, [0.5], HUGE],
        "a finite number in [0, 1]",
    ),
    "temperature": (
        [-0.1, -1, NAN, INF, -INF, True, False, "1", None, HUGE],
        "a finite number in [0, inf]",
    ),
    "top_k": ([0, -1, True, 1.0, "5", NAN], "at least 1"),
    "top_p": ([0, 0.0, -0.1, 1.01, NAN, INF, True, "1", HUGE], "a finite number in (0, 1]"),
    "min_p": ([-0.1, 1.01, NAN, INF, True, "0", HUGE], "a finite number in [0, 1]"),
    "seed": ([-1, 2**63, True, 1.0, "1", NAN], "at least 0, at most 9223372036854775807"),
    "eos_token_id": ([-1, True, 2.0, "2", NAN], "at least 0"),
    "draft_steps": ([0, -1, 257, *WHOLE], "at least 1, at most 256"),
    "min_tokens": ([-1, 65, *WHOLE], "at least 0, at most 64"),
    "min_steps_per_block": ([0, -1, 17, True, 1.0, "1", NAN], "at least 1, at most 16"),
    "min_confidence_threshold": (
        [-0.01, 0.81, NAN, INF, True, "0.5", HUGE],
        "a finite number in [0, 0.8]",
    ),
    "stop": (["", "ab", None, 3, {"a": 1}, b"a"], "a list of strings"),
    "presence_penalty": (
        [-2.01, 2.01, NAN, INF, True, "0", None, HUGE],
        "a finite number in [-2, 2]",
    ),
    "frequency_penalty": (
        [-2.01, 2.01, NAN, -INF, False, "0", None, HUGE],
        "a finite number in [-2, 2]",
    ),
    "logit_bias": ([None, 3, "ab", b"a", {1}], "a mapping of token ids to numbers, or pairs"),
    "top_logprobs": ([-1, 21, *WHOLE], "at least 0, at most 20"),
    "provisional": ([None, 0, 1, "true", NAN], "true or false"),
    "quality": (["", "AR", "best", None, 1, ["ar"]], "one of ar, near, fast"),
    "draft_source": (["", "none", None, True], "one of any, lookup, denoiser"),
    "acceptance": (["", "lossless", None, 0.3], "one of strict, mix"),
    "mix_ratio": ([-0.01, 1.01, NAN, INF, True, "0.3", None, HUGE], "a finite number in [0, 1]"),
    "commit_rule": (["", "rightmost", None, 1], "one of released, leftmost, product"),
    "first_token": (["", "ar", False, 0], "one of context, denoiser"),
    "eos_from": ([-1, *WHOLE], "at least 0"),
}
GOOD: dict[str, list[Any]] = {
    "mode": ["mask_diffusion", "ar", "mock_ar", "verified", "auto"],
    "max_tokens": [1, 10**6],
    "block_size": [1, 256],
    "steps_per_block": [1, 10**6],
    "confidence_threshold": [0, 0.0, 1, 1.0, 0.5],
    "temperature": [0, 0.0, 1e-45, 1, 1e30],
    "top_k": [None, 1, 10**9],
    "top_p": [None, 1e-30, 1, 1.0],
    "min_p": [None, 0, 0.0, 1.0],
    "seed": [None, 0, 2**63 - 1],
    "eos_token_id": [None, 0, 5],
    "draft_steps": [1, 256],
    "min_tokens": [0, 64],
    "min_steps_per_block": [None, 1, 16],
    "min_confidence_threshold": [None, 0, 0.0, 0.8],
    "stop": [(), ("a",), ("x" * 256, "日") * 8],
    "presence_penalty": [-2, 0, 2.0],
    "frequency_penalty": [-2.0, 0.0, 2],
    "logit_bias": [(), ((0, -100.0), (2**31 - 1, 100.0)), tuple((i, 1.0) for i in range(1024))],
    "top_logprobs": [0, 20],
    "provisional": [False, True],
    "quality": ["ar", "near", "fast"],
    "draft_source": ["any", "lookup", "denoiser"],
    "acceptance": ["strict", "mix"],
    "mix_ratio": [0, 0.0, 0.5, 1],
    "commit_rule": ["released", "leftmost", "product"],
    "first_token": [None, "context", "denoiser"],
    "eos_from": [0, 10**9],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, (values, _) in BAD.items() for value in values]
)
def test_a_bad_value_is_named_with_its_limit(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        GenerationParams(**{field: value})
    error = caught.value
    assert error.field == field
    assert error.value is value
    assert BAD[field][1] in error.limit
    assert str(error).startswith(f"{field}: got ")
    assert error.limit in str(error)
    assert len(str(error)) < 250


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in GOOD.items() for value in values]
)
def test_the_ends_of_every_limit_are_allowed(field: str, value: Any) -> None:
    assert getattr(GenerationParams(**{field: value}), field) == value


def test_stop_strings_are_kept_as_a_tuple() -> None:
    assert GenerationParams(stop=["a", "\n\n"]).stop == ("a", "\n\n")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stop", "field", "limit"),
    [
        (["a"] * 17, "stop", "at most 16 strings"),
        (["a", ""], r"stop\[1\]", "1 to 256 characters"),
        (["a", "b", "x" * 257], r"stop\[2\]", "1 to 256 characters"),
        ([None], r"stop\[0\]", "1 to 256 characters"),
    ],
)
def test_a_bad_stop_string_is_named_by_its_place(stop: Any, field: str, limit: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{field}: got .*{limit}"):
        GenerationParams(stop=stop)


@pytest.mark.parametrize(
    "given",
    [
        {9: 1, 2: -0.5},
        [(9, 1), (2, -0.5)],
        [[2, -0.5], [9, 1.0]],
        {np.int64(9): np.float32(1.0), torch.tensor(2): torch.tensor(-0.5)},
    ],
    ids=["mapping", "pairs", "lists", "arrays"],
)
def test_a_bias_is_kept_by_token(given: Any) -> None:
    kept = GenerationParams(logit_bias=given).logit_bias
    assert kept == ((2, -0.5), (9, 1.0))
    assert [type(part) for pair in kept for part in pair] == [int, float] * 2


@pytest.mark.parametrize(
    ("bias", "field", "limit"),
    [
        (dict.fromkeys(range(1025), 0.0), "logit_bias", "at most 1024 tokens"),
        ({-1: 0.0}, "logit_bias", "at least 0"),
        ({2**31: 0.0}, "logit_bias", "at most 2147483647"),
        ({10**5000: 0.0}, "logit_bias", "at most 2147483647"),
        ({"5": 0.0}, "logit_bias", "a whole number"),
        ({True: 0.0}, "logit_bias", "a whole number"),
        ([(5, 1.0, 2)], "logit_bias", "or pairs of these"),
        ([5], "logit_bias", "or pairs of these"),
        ({5: 100.1}, r"logit_bias\[5\]", r"a finite number in \[-100, 100\]"),
        ({5: NAN}, r"logit_bias\[5\]", "a finite number"),
        ({5: None}, r"logit_bias\[5\]", "a finite number"),
        ([(7, 1.0), (5, 1.0), (5, 1.0)], r"logit_bias\[5\]", "one for a token"),
    ],
)
def test_a_bad_bias_is_named_by_its_token(bias: Any, field: str, limit: str) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{field}: got .*{limit}"):
        GenerationParams(logit_bias=bias)


def test_a_bias_is_of_the_vocabulary() -> None:
    check(GenerationParams(logit_bias={49: 1.0}), [1])  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match=r"^logit_bias\[50\]: got 50, .* below 50"):
        check(GenerationParams(logit_bias={3: 1.0, 50: 1.0, 51: 1.0}), [1])  # type: ignore[arg-type]


def test_the_first_position_of_eos_follows_from_the_prompt() -> None:
    params = GenerationParams(min_tokens=5, seed=1)
    assert params.for_prompt(7) == replace(params, eos_from=12)


FLOORS = GenerationParams(
    seed=1,
    steps_per_block=12,
    confidence_threshold=0.9,
    min_steps_per_block=4,
    min_confidence_threshold=0.3,
)


@pytest.mark.parametrize(
    ("share", "steps", "threshold"),
    [(0.0, 12, 0.9), (0.25, 10, 0.75), (0.5, 8, 0.6), (0.75, 6, 0.45), (1.0, 4, 0.3)],
)
def test_easing_goes_from_what_was_asked_to_the_floors(
    share: float, steps: int, threshold: float
) -> None:
    eased = FLOORS.eased(share)
    assert eased.steps_per_block == steps
    assert eased.confidence_threshold == pytest.approx(threshold, abs=1e-12)
    assert not eased.may_be_eased
    assert eased.eased(1.0) == eased
    only_steps = replace(FLOORS, min_confidence_threshold=None).eased(share)
    assert (only_steps.steps_per_block, only_steps.confidence_threshold) == (steps, 0.9)
    only_threshold = replace(FLOORS, min_steps_per_block=None).eased(share)
    assert only_threshold.steps_per_block == 12
    assert only_threshold.confidence_threshold == pytest.approx(threshold, abs=1e-12)


def test_easing_never_passes_a_floor() -> None:
    """Of these floors a quarter would be missed by their last bit; halves are always met."""
    for asked in range(1, 1000):
        params = GenerationParams(
            confidence_threshold=asked / 999, min_confidence_threshold=asked / 3000
        )
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            assert asked / 3000 <= params.eased(share).confidence_threshold <= asked / 999
        assert params.eased(0.0).confidence_threshold == asked / 999
        assert params.eased(1.0).confidence_threshold == pytest.approx(asked / 3000, rel=1e-12)


@pytest.mark.parametrize("mode", ["ar", "mock_ar", "verified"])
def test_other_modes_are_never_eased(mode: Any) -> None:
    params = replace(FLOORS, mode=mode)
    assert not params.may_be_eased
    eased = params.eased(1.0)
    assert (eased.steps_per_block, eased.confidence_threshold) == (12, 0.9)
    assert not GenerationParams().may_be_eased


def test_every_field_is_in_the_tables() -> None:
    assert set(BAD) == set(GOOD) == set(GenerationParams.__dataclass_fields__)


def check(
    params: GenerationParams, prompt: list[Any], generated: list[Any] | None = None, room: int = 100
) -> None:
    params.check_row(prompt, vocab_size=50, max_context=room, generated=generated or [])


@pytest.mark.parametrize("token", [-1, 50, 10**30, True, 1.0, "a", None, NAN])
def test_an_id_out_of_range_is_named_by_its_place(token: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"prompt\[2\]: got .*expected an id in 0..49"):
        check(GenerationParams(), [1, 2, token])
    with pytest.raises(InvalidRequestError, match=r"generated_token_ids\[1\]: got .* in 0..49"):
        check(GenerationParams(mode="ar"), [1], [4, token])


def test_an_empty_prompt_and_a_foreign_eos() -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: got \[\], expected at least 1 token"):
        check(GenerationParams(), [])
    with pytest.raises(InvalidRequestError, match=r"^eos_token_id: got 50, expected below 50"):
        check(GenerationParams(eos_token_id=50), [1])
    check(GenerationParams(eos_token_id=49), [0, 3, 49])


@pytest.mark.parametrize(
    ("mode", "max_tokens", "prompt", "fits"),
    [
        ("mask_diffusion", 33, 52, True),
        ("mask_diffusion", 33, 53, False),
        ("mask_diffusion", 48, 52, True),
        ("ar", 50, 50, True),
        ("ar", 51, 50, False),
        ("mock_ar", 99, 1, True),
        ("mock_ar", 100, 1, False),
        ("ar", 10**30, 1, False),
        ("verified", 50, 34, True),
        ("verified", 50, 35, False),
    ],
)
def test_a_row_has_to_fit_in_whole_blocks(
    mode: Any, max_tokens: int, prompt: int, fits: bool
) -> None:
    params = GenerationParams(mode=mode, max_tokens=max_tokens)
    if fits:
        check(params, [1] * prompt)
        return
    with pytest.raises(InvalidRequestError, match=r"^max_tokens: .*at most 100 tokens of context"):
        check(params, [1] * prompt)


def test_what_cannot_be_resumed() -> None:
    with pytest.raises(InvalidRequestError, match="whole blocks of 16"):
        check(GenerationParams(max_tokens=64), [1], [5] * 17)
    check(GenerationParams(max_tokens=64), [1], [5] * 32)
    check(GenerationParams(mode="mock_ar", max_tokens=64), [1], [5] * 17)
    check(GenerationParams(mode="verified", max_tokens=64), [1], [5] * 17)
    for mode in ("ar", "mask_diffusion"):
        with pytest.raises(InvalidRequestError, match="fewer than 16"):
            check(GenerationParams(mode=mode, max_tokens=16), [1], [5] * 16)


def test_a_seed_is_kept_or_drawn() -> None:
    given = GenerationParams(seed=5)
    assert given.with_seed() is given
    drawn = {GenerationParams().with_seed().seed for _ in range(20)}
    assert len(drawn) == 20
    assert all(seed is not None and 0 <= seed < 2**63 for seed in drawn)


def test_row_keys_differ_by_seed_and_stay_what_they_are() -> None:
    keys = {row_key(seed) for seed in range(200)}
    assert len(keys) == 200
    assert all(0 <= key < 2**64 for key in keys)
    # Recorded: a key that moved would change the text of every seed that users have kept.
    assert row_key(0) == int.from_bytes(bytes.fromhex(RECORDED_KEY), "little")


RECORDED_KEY = "2bc42e553a894a51"


WHOLES = ["max_tokens", "block_size", "steps_per_block", "top_k", "seed", "eos_token_id"]
WHOLES += ["draft_steps", "min_tokens", "min_steps_per_block", "eos_from"]
REALS = ["confidence_threshold", "temperature", "top_p", "min_p", "min_confidence_threshold"]


@pytest.mark.parametrize("field", WHOLES + REALS)
def test_numbers_of_other_libraries_are_kept_as_pythons(field: str) -> None:
    whole = field in WHOLES
    value = 7 if whole else 0.5
    others: list[Any] = [np.array(value), torch.tensor(value)]
    others += [np.int64(7), np.uint8(7)] if whole else [np.float32(0.5), np.float64(0.5)]
    for other in others:
        params = GenerationParams(**{field: other})
        assert params == GenerationParams(**{field: value})
        assert type(getattr(params, field)) is type(value)
    wrong: list[Any] = [np.bool_(True), torch.tensor(True), np.array([7]), torch.tensor([0.5])]
    for other in [*wrong, np.float64(7.0), torch.tensor(7.0)] if whole else wrong:
        with pytest.raises(InvalidRequestError, match=f"^{field}: got .*expected a "):
            GenerationParams(**{field: other})


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "🌍\udcff!"])
def test_half_a_character_is_no_text(text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"stop\[1\]\[\d\]: got"):
        GenerationParams(stop=("a", text))


@pytest.mark.parametrize("value", ["a" * 1_000_000, [5] * 1000, 10**1000], ids=type)
def test_little_is_said_of_a_huge_value(value: object) -> None:
    text = str(InvalidRequestError("mode", value, "something shorter"))
    assert len(text) < 150
    assert text.endswith("..., expected something shorter")


def test_a_number_that_python_does_not_write_out() -> None:
    text = str(InvalidRequestError("seed", 1 << 50_000, "less"))
    assert text == "seed: got a whole number of 50001 bits, expected less"
    with pytest.raises(InvalidRequestError, match="seed: got a whole number of 50001 bits"):
        GenerationParams(seed=1 << 50_000)


@pytest.mark.parametrize("wrong", [512, -1, True, 5.0, "5", None])
def test_a_wrong_id_among_many_is_named(wrong: object) -> None:
    prompt: list[Any] = [5] * 40 + [wrong, 6]
    named = r"prompt\[40\]: got .*, expected an id in 0..511"
    with pytest.raises(InvalidRequestError, match=named):
        GenerationParams().check_row(prompt, 512, 8192, [])


@pytest.mark.parametrize(
    ("given", "uses", "needs"),
    [
        ({"mode": "mask_diffusion", "draft_source": "lookup"}, True, True),
        ({"mode": "ar", "draft_source": "denoiser"}, False, False),
        ({"mode": "verified"}, True, False),
        ({"mode": "verified", "draft_source": "lookup"}, False, False),
        ({"mode": "verified", "draft_source": "denoiser"}, True, True),
        # In auto the service chooses, whatever else is said.
        ({"mode": "auto", "draft_source": "denoiser"}, True, False),
        ({"mode": "auto", "draft_source": "lookup", "quality": "fast"}, True, False),
    ],
)
def test_which_rows_want_a_denoiser(given: dict[str, Any], uses: bool, needs: bool) -> None:
    params = GenerationParams(**given)
    assert (params.uses_denoiser, params.needs_denoiser) == (uses, needs)


@pytest.mark.parametrize(
    ("given", "starts"),
    [
        ({"commit_rule": "released"}, False),
        ({"commit_rule": "leftmost"}, True),
        ({"commit_rule": "product"}, True),
        ({"commit_rule": "released", "first_token": "context"}, True),
        ({"commit_rule": "leftmost", "first_token": "denoiser"}, False),
        ({"mode": "verified", "first_token": "context"}, False),
    ],
)
def test_who_draws_the_first_token_of_a_block(given: dict[str, Any], starts: bool) -> None:
    assert GenerationParams(**given).starts_with_context == starts


def test_a_mix_is_none_where_acceptance_is_strict() -> None:
    assert GenerationParams(mix_ratio=0.75).mix == 0.0
    assert GenerationParams(mix_ratio=0.75, acceptance="mix").mix == 0.75
