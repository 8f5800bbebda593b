"""The drawn requests have the mix that a soak needs, and repeat exactly."""

from __future__ import annotations

from collections import Counter
from itertools import islice

from benchmarks.soak_requests import (
    DELAYS,
    MAX_NEW,
    MAX_PROMPT,
    MODES,
    RequestMaker,
    SoakRequest,
    phases_of,
)
from twotower.towers.request.params import GenerationParams

VOCAB, EOS = 96, 2


def drawn(count: int, seed: int = 0) -> list[SoakRequest]:
    return list(RequestMaker(VOCAB, EOS, seed).requests(count))


def test_the_same_seed_gives_the_same_requests_in_any_portions() -> None:
    maker = RequestMaker(VOCAB, EOS, 3)
    portions = [*maker.requests(7), *maker.requests(13)]
    assert portions == drawn(20, seed=3)
    assert portions != drawn(20, seed=4)


def test_every_request_is_valid_and_short() -> None:
    for request in drawn(2000):
        assert 1 <= len(request.prompt) <= MAX_PROMPT
        assert 1 <= request.params.max_tokens <= MAX_NEW
        request.params.check_row(list(request.prompt), VOCAB, 128, [])


def test_the_mix() -> None:
    requests = drawn(5000)
    modes = Counter(request.params.mode for request in requests)
    assert all(abs(modes[mode] / 5000 - share) < 0.03 for mode, share in MODES.items())
    cancelled = sum(request.cancel is not None for request in requests) / 5000
    assert 0.17 < cancelled < 0.23
    prompts = Counter(request.prompt for request in requests)
    assert sum(count for count in prompts.values() if count > 1) > 1000
    beginnings = Counter(request.prompt[:64] for request in requests if len(request.prompt) > 64)
    assert sum(count for count in beginnings.values() if count > 1) > 1500
    assert sum(request.checked for request in requests) > 20


def test_every_phase_is_cancelled_in_and_only_those_that_a_row_has() -> None:
    phases: Counter[str] = Counter()
    for request in drawn(5000):
        cancel = request.cancel
        if cancel is not None:
            assert cancel.phase in phases_of(request.params)
            assert 0.0 <= cancel.delay <= DELAYS[cancel.phase]
            phases[cancel.phase] += 1
    assert set(phases) == set(DELAYS)
    assert min(phases.values()) > 50


def test_a_row_of_one_block_is_never_extended() -> None:
    one_block = GenerationParams(max_tokens=8, block_size=8)
    assert "extension" not in phases_of(one_block)
    assert "extension" in phases_of(GenerationParams(max_tokens=9, block_size=8))
    assert phases_of(GenerationParams(mode="ar")) == ("queued", "prefill", "denoising")
    assert list(islice(phases_of(GenerationParams(mode="verified", max_tokens=1)), 5)) == list(
        DELAYS
    )
