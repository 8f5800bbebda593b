"""The prediction kernels against the reference and fp64, over many small tiles."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.kernels.test_philox import KNOWN
from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from twotower.kernels import unmask, unmask_triton
from twotower.kernels.philox import uniforms
from twotower.kernels.unmask import SamplingBatch
from twotower.kernels.unmask_triton import _philox, predict

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN, INF = float("nan"), float("inf")
TILE = 64


@pytest.fixture(autouse=True)
def _small_tiles_in_spoilt_memory(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fills new memory with NaN, so that an element that no kernel wrote shows."""
    if "gpu" not in request.keywords:
        monkeypatch.setattr(unmask_triton, "_TILE", TILE)
    allocate = torch.empty

    def spoilt(*args: object, dtype: torch.dtype, **kwargs: object) -> Tensor:
        worst = NAN if dtype.is_floating_point else torch.iinfo(torch.int32).max
        return allocate(*args, dtype=dtype, **kwargs).fill_(worst)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(torch, "empty", spoilt)


def sampling_batch(
    count: int, temperature: float = 0.0, excluded: int = -1, barred: int = -1
) -> SamplingBatch:
    """Every line with a key, position and step of its own; keys of both signs."""
    generator = torch.Generator().manual_seed(count)
    own = SamplingBatch(
        torch.full((count,), temperature),
        torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator),
        torch.arange(count) * 1_000_003,
        torch.arange(count) % 5,
        1 + torch.arange(count) % 2,
        torch.full((count,), excluded),
        torch.full((count,), barred),
    )
    return SamplingBatch(*(getattr(own, field.name).to(DEVICE) for field in fields(SamplingBatch)))


def mixed_lines(count: int, vocab: int) -> SamplingBatch:
    """Greedy and drawn lines, some with an excluded or a barred token."""
    index = torch.arange(count, device=DEVICE)
    some = torch.where(index % 3 == 0, index * 7 % vocab, -1)
    others = torch.where(index % 4 == 1, index * 5 % vocab, -1)
    temperature = (index % 2) * (0.2 + 0.3 * index)
    return replace(sampling_batch(count), temperature=temperature, excluded=some, barred=others)


def pick(lines: SamplingBatch, chosen: list[int] | slice) -> SamplingBatch:
    return SamplingBatch(*(getattr(lines, field.name)[chosen] for field in fields(SamplingBatch)))


@triton.jit
def _words_kernel(key, counter, words):  # type: ignore[no-untyped-def]
    c0, c1, c2, c3 = _philox(
        tl.load(key),
        tl.load(counter).to(tl.uint32),
        tl.load(counter + 1).to(tl.uint32),
        tl.load(counter + 2).to(tl.uint32),
        tl.load(counter + 3).to(tl.uint32),
    )
    tl.store(words, c0.to(tl.int64))
    tl.store(words + 1, c1.to(tl.int64))
    tl.store(words + 2, c2.to(tl.int64))
    tl.store(words + 3, c3.to(tl.int64))


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_known_answers(
    counter: tuple[int, ...], key: tuple[int, int], want: tuple[int, ...]
) -> None:
    both = key[0] | key[1] << 32
    signed = torch.tensor([both - 2**64 if both >= 2**63 else both], device=DEVICE)
    words = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    _words_kernel[1,](signed, torch.tensor(counter, device=DEVICE), words)
    assert words.tolist() == list(want)


@pytest.mark.parametrize("vocab", [2, 15, 64, 65, 130])
@pytest.mark.parametrize("filtered", [False, True])
def test_mixed_lines_are_those_of_the_reference(vocab: int, filtered: bool) -> None:
    logits = normal(8, vocab, scale=4.0).to(DEVICE)
    lines = mixed_lines(8, vocab)
    scores = None
    if filtered:
        scores = torch.log_softmax(unmask.without(logits / 0.6, lines.excluded), dim=-1)
        scores = scores.masked_fill(scores < scores.median(-1, keepdim=True).values, -INF)
    got, want = predict(logits, lines, scores), unmask.predict(logits, lines, scores)
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in want]
    assert_same_bits(got[0], want[0], "tokens")
    assert_relative_rms(got[1], want[1], 2e-6)
    assert_relative_rms(got[2], want[2], 2e-6)
    assert got[3].tolist() == [True] * 8


def test_a_draw_adds_gumbel_noise_to_logits_over_temperature() -> None:
    """In fp64, from the uniforms of the row's key."""
    logits, lines = normal(20, 70, scale=3.0).to(DEVICE), sampling_batch(20, temperature=0.8)
    tokens, confidences, _, _ = predict(logits, lines)
    noise = uniforms(lines.key, lines.position, lines.step, lines.domain, 70).double()
    scores = logits.double() / 0.8 - (-noise.log()).log()
    assert_same_bits(tokens, scores.argmax(-1))
    # Untempered.
    true = torch.softmax(logits.double(), dim=-1).gather(1, tokens[:, None])[:, 0]
    assert_relative_rms(confidences, true, 1e-6)
    assert len(set(tokens.tolist()) - set(logits.argmax(-1).tolist())) > 3


def test_ties_go_to_the_lowest_id_within_and_across_tiles() -> None:
    logits = torch.zeros(5, 100, device=DEVICE)
    logits[1, [99, 40, 41]] = 7.0
    logits[2, [63, 64]] = 7.0
    logits[3, [30, 96]] = 7.0
    lines = replace(sampling_batch(5), barred=torch.tensor([-1, 40, -1, -1, 0], device=DEVICE))
    lines = replace(lines, excluded=torch.tensor([-1, -1, -1, 30, -1], device=DEVICE))
    assert predict(logits, lines)[0].tolist() == [0, 41, 63, 96, 1]
    # So large that noise is lost in them.
    scores = torch.where(logits > 0, 1e30, 0.0)
    drawn = replace(lines, temperature=torch.ones(5, device=DEVICE))
    assert predict(logits, drawn, scores)[0][1:4].tolist() == [41, 63, 96]


def test_an_excluded_token_is_not_counted_and_a_barred_one_is() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 9.0]], device=DEVICE).repeat(3, 1)
    lines = replace(sampling_batch(3), excluded=torch.tensor([3, 1, 1], device=DEVICE))
    lines = replace(lines, barred=torch.tensor([-1, 3, -1], device=DEVICE))
    tokens, confidences, log_probs, _ = predict(logits, lines)
    assert tokens.tolist() == [1, 2, 3]
    counted = [(1.0, 3.0, 2.0), (1.0, 2.0, 9.0), (1.0, 2.0, 9.0)]
    chosen = [3.0, 2.0, 9.0]
    want = [
        math.exp(logit) / sum(map(math.exp, others))
        for logit, others in zip(chosen, counted, strict=True)
    ]
    assert confidences.tolist() == pytest.approx(want, rel=1e-6)
    assert log_probs.tolist() == pytest.approx([math.log(value) for value in want], abs=2e-7)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_tile_of_nothing_but_the_excluded_token_adds_nothing(temperature: float) -> None:
    logits = normal(4, TILE + 1).to(DEVICE)
    whole = predict(logits, sampling_batch(4, temperature, excluded=TILE))
    for got, want in zip(
        whole, predict(logits[:, :TILE], sampling_batch(4, temperature)), strict=True
    ):
        assert_same_bits(got, want)


@pytest.mark.parametrize("wrong", [NAN, INF, -INF])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_lines_with_a_non_finite_logit_are_reported_and_harm_no_other(
    wrong: float, temperature: float
) -> None:
    logits, lines = normal(6, 70).to(DEVICE), sampling_batch(6, temperature, excluded=3)
    clean = predict(logits, lines)
    logits[1, 0] = logits[2, 3] = logits[4, 69] = wrong
    logits[5] = wrong
    spoilt = predict(logits, lines)
    assert spoilt[3].tolist() == [True, False, False, True, False, False]
    assert 0 <= int(spoilt[0].min()) <= int(spoilt[0].max()) < 70
    for got, want in zip(spoilt, clean, strict=True):
        assert_same_bits(got[[0, 3]], want[[0, 3]])


def test_what_is_filtered_out_is_never_drawn() -> None:
    scores = torch.full((9, 70), -INF, device=DEVICE)
    scores[:, 45] = math.log(1e-6)
    scores[1] = NAN
    logits = normal(9, 70, scale=5.0).to(DEVICE)
    tokens, _, log_probs, finite = predict(logits, sampling_batch(9, 1.0), scores)
    assert 0 <= int(tokens[1]) < 70
    others = [line for line in range(9) if line != 1]
    assert set(tokens[others].tolist()) == {45}
    want = torch.log_softmax(logits.double(), dim=-1)[:, 45]
    assert_relative_rms(log_probs[others], want[others], 1e-6)
    assert bool(finite.all())


# The interpreter tells of quotients that become minus infinity, as they should.
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_a_temperature_next_to_zero_is_greedy() -> None:
    logits = normal(4, 70, scale=1e3).to(DEVICE)
    first = logits.topk(2).indices
    lines = replace(
        sampling_batch(4, 1e-38), barred=torch.where(first[:, 0] % 2 == 0, first[:, 0], -1)
    )
    want = torch.where(first[:, 0] % 2 == 0, first[:, 1], first[:, 0])
    for temperature in (1e-38, 1e-45, 1e-3):
        lines.temperature.fill_(temperature)
        assert predict(logits, lines)[0].tolist() == want.tolist()


def test_a_certain_token_has_confidence_one_and_never_more() -> None:
    logits = normal(1, 200).to(DEVICE)
    logits[0, 150] = 90.0
    assert [part.tolist() for part in predict(logits, sampling_batch(1))[:3]] == [
        [150],
        [1.0],
        [0.0],
    ]
    many = predict(normal(40, 40, scale=20.0).to(DEVICE), sampling_batch(40))
    assert float(many[1].max()) <= 1.0
    assert float(many[2].max()) <= 0.0


def test_the_log_probability_is_exact_near_zero_and_far_below() -> None:
    logits = torch.zeros(2, 40, device=DEVICE)
    logits[0, 7], logits[1, 30] = 16.0, 200.0
    scores = torch.full((2, 40), -INF, device=DEVICE)
    scores[0, 7], scores[1, 3] = 0.0, 0.0
    _, confidences, log_probs, _ = predict(logits, sampling_batch(2, 1.0), scores)
    want = torch.log_softmax(logits.double(), dim=-1)
    assert float(log_probs[0]) == pytest.approx(float(want[0, 7]), abs=2e-7)
    assert float(log_probs[0]) < 0.0
    assert (float(confidences[1]), float(log_probs[1])) == (0.0, -200.0)


def test_a_line_has_its_bits_in_any_batch() -> None:
    logits, lines = normal(6, 130, scale=4.0).to(DEVICE), mixed_lines(6, 130)
    whole = predict(logits, lines)
    for batch in ([0], [1], [2], [3], [5, 2], [4, 0, 2, 5, 1, 3]):
        parts = predict(logits[batch], pick(lines, batch))
        for got, want in zip(parts, whole, strict=True):
            assert_same_bits(got, want[batch], batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_and_not_changed(dtype: torch.dtype) -> None:
    logits, lines = normal(4, 70, scale=4.0).to(DEVICE, dtype), mixed_lines(4, 70)
    for got, want in zip(predict(logits, lines), predict(logits.float(), lines), strict=True):
        assert_same_bits(got, want)


def test_strided_logits_and_scores_with_nan_around() -> None:
    logits, lines = normal(3, 70).to(DEVICE), mixed_lines(3, 70)
    guarded = torch.full((5, 90), NAN, device=DEVICE)
    guarded[1:4, 10:80] = logits
    view = guarded[1:4, 10:80]
    for got, want in zip(predict(view, lines), predict(logits, lines), strict=True):
        assert_same_bits(got, want)
    for got, want in zip(predict(logits, lines, view), predict(logits, lines, logits), strict=True):
        assert_same_bits(got, want)
    assert_same_bits(view, logits)


def test_no_lines() -> None:
    got = predict(torch.zeros(0, 70, device=DEVICE), sampling_batch(0))
    assert [len(part) for part in got] == [0, 0, 0, 0]


def _tile_launch(has_scores: bool) -> Launch:
    words = ("keys", "positions", "steps", "domains", "excluded", "barred")
    signature = {
        "logits": "*bf16",
        **dict.fromkeys(("draw_scores", "temperatures", "partials"), "*fp32"),
        **dict.fromkeys(words, "*i64"),
        **dict.fromkeys(("tokens", "nonfinite"), "*i32"),
        **dict.fromkeys(("logits_stride", "scores_stride", "vocab", "lines"), "i32:16"),
    }
    constants = {"has_scores": has_scores, "tile": 2048}
    return Launch("twotower.kernels.unmask_triton:_tile_kernel", signature, constants)


LAUNCHES = [
    _tile_launch(False),
    _tile_launch(True),
    Launch(
        "twotower.kernels.unmask_triton:_merge_kernel",
        {
            "logits": "*bf16",
            **dict.fromkeys(("temperatures", "partials", "confidences", "log_probs"), "*fp32"),
            **dict.fromkeys(("tile_tokens", "nonfinite"), "*i32"),
            "tokens": "*i64",
            "finite": "*i1",
            **dict.fromkeys(("logits_stride", "tiles", "lines"), "i32:16"),
        },
        {"block": 64},
        num_warps=1,
    ),
]


def test_the_real_shapes_compile_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 640])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_vocabulary_of_131072(count: int, temperature: float) -> None:
    logits = normal(count, 131072, scale=4.0).bfloat16().to(DEVICE)
    lines = sampling_batch(count, temperature, excluded=3)
    first, second = predict(logits, lines), predict(logits, lines)
    for got, again in zip(first, second, strict=True):
        assert_same_bits(got, again)
    wide = logits.double()
    wide[:, 3] = -INF
    scores = wide
    if temperature:
        noise = uniforms(lines.key, lines.position, lines.step, lines.domain, 131072).double()
        scores = wide - (-noise.log()).log()
    # A draw is the best up to fp32's rounding of scores and noise; a greedy token exactly.
    best, own = scores.amax(-1), scores.gather(1, first[0][:, None])[:, 0]
    assert float((best - own).max()) <= (1e-5 if temperature else 0.0)
    want = torch.log_softmax(wide, dim=-1).gather(1, first[0][:, None])[:, 0]
    assert_relative_rms(first[2], want, 1e-5)
    assert_relative_rms(first[1], want.exp(), 1e-5)
