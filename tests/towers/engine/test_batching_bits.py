"""A row in a mixed batch has exactly the bits that it has alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twotower import GenerationParams, Request, TwoTower
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import PREFILL_CHUNK, EngineOptions
from twotower.towers.engine.prefill import prefill_pieces

GOLDEN = Path(__file__).parents[2] / "golden"


def mixed_requests(vocab_size: int) -> list[Request]:
    generator = torch.Generator().manual_seed(7)

    def prompt(length: int) -> list[int]:
        return torch.randint(0, vocab_size, (length,), generator=generator).tolist()

    return [
        Request(prompt(1), GenerationParams(max_tokens=40, confidence_threshold=0.5, seed=1)),
        Request(prompt(70), GenerationParams(max_tokens=33, steps_per_block=5, seed=2)),
        Request(
            [*prompt(9), 3, 3],
            GenerationParams(max_tokens=20, block_size=8, temperature=1.0, top_p=0.9, seed=3),
        ),
        Request(prompt(130), GenerationParams(mode="ar", max_tokens=21, seed=4)),
        Request(prompt(5), GenerationParams(mode="ar", max_tokens=30, temperature=1.0, seed=5)),
        Request(prompt(1), GenerationParams(mode="mock_ar", max_tokens=12, seed=6)),
        Request(
            prompt(33), GenerationParams(mode="mock_ar", max_tokens=9, temperature=0.7, seed=7)
        ),
        Request(
            prompt(40),
            GenerationParams(
                mode="verified",
                draft_source="denoiser",
                max_tokens=25,
                temperature=1.0,
                top_p=0.9,
                seed=9,
            ),
        ),
        Request(
            prompt(3),
            GenerationParams(
                mode="verified", draft_source="denoiser", max_tokens=18, block_size=8, seed=10
            ),
        ),
        Request(
            prompt(17),
            GenerationParams(max_tokens=64, confidence_threshold=0.3, eos_token_id=11, seed=8),
        ),
    ]


@pytest.mark.parametrize("name", ["tiny_a", "tiny_b"])
def test_a_mixed_batch_gives_what_its_rows_give_alone(name: str) -> None:
    engines = load_engines(GOLDEN / name, "cpu", "cpu", torch.float32)
    model = TwoTower(*engines, None)
    requests = mixed_requests(model.config.vocab_size)
    together = model.generate_requests(requests)
    alone = [model.generate_requests([request])[0] for request in requests]
    for joint, single in zip(together, alone, strict=True):
        assert joint.token_ids == single.token_ids
        # Equal floats, not close ones: confidences are compared with thresholds.
        assert [b.confidences for b in joint.blocks] == [b.confidences for b in single.blocks]
        assert [b.commit_steps for b in joint.blocks] == [b.commit_steps for b in single.blocks]
    assert [engine.num_rows for engine in engines] == [0, 0]


def test_two_threads_give_what_one_gives() -> None:
    # Two models: the second must not find the first one's work in a prefix cache.
    model, other = (TwoTower.from_pretrained(GOLDEN / "tiny_b") for _ in range(2))
    # A prompt of one token, one of several pieces, and drawn tokens. A few passes will do: beside
    # other processes each product waits until both threads have a core.
    requests = [
        replace(request, params=replace(request.params, max_tokens=16, steps_per_block=4))
        for request in mixed_requests(model.config.vocab_size)[:3]
    ]
    single = model.generate_requests(requests)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        double = other.generate_requests(requests)
    finally:
        torch.set_num_threads(before)
    assert [result.blocks for result in double] == [result.blocks for result in single]


def test_the_batch_really_shared_passes() -> None:
    context, denoiser = load_engines(GOLDEN / "tiny_a", "cpu", "cpu", torch.float32)
    model = TwoTower(context, denoiser, None)
    model.generate_requests(mixed_requests(model.config.vocab_size))
    stats = denoiser.stats()
    assert stats.pass_rows > 1.5 * stats.passes


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar", "verified"])
def test_separate_devices_give_what_shared_ones_give(mode: str) -> None:
    """A copied mirror against a shared state: the copy path has the same bits."""
    shared = TwoTower.from_pretrained(GOLDEN / "tiny_b")
    context, denoiser = load_engines(GOLDEN / "tiny_b", "cpu", "cpu", torch.float32)
    mirroring = DenoiserEngine(denoiser.tower, pool=EngineOptions().pool_for(denoiser.tower))
    context.link = LocalLink(context.tower, mirroring, shared=False)
    copied = TwoTower(context, mirroring, None)
    how: Any = {"mode": mode, "draft_source": "denoiser"}
    params = GenerationParams(max_tokens=24, seed=3, temperature=0.8, **how)
    request = Request([7, 8, 9, 3, 1], params)
    left = shared.generate_requests([request])[0]
    right = copied.generate_requests([request])[0]
    assert left.token_ids == right.token_ids
    assert left.blocks == right.blocks


def test_a_resumed_prompt_is_cut_where_it_was_cut_before() -> None:
    prompt, generated = list(range(2 * PREFILL_CHUNK + 22)), list(range(32))
    diffusion = prefill_pieces(prompt, generated, GenerationParams(), PREFILL_CHUNK)
    assert [len(piece) for piece in diffusion] == [256, 256, 22, 16, 16]
    mock_ar = GenerationParams(mode="mock_ar")
    mock = prefill_pieces(prompt, generated[:2], mock_ar, PREFILL_CHUNK)
    assert [len(piece) for piece in mock] == [256, 256, 21, 1, 1, 1]
    assert [token for piece in diffusion for token in piece] == prompt + generated
