"""In deterministic mode a row's bits through the kernels are those that it has alone.

Under Triton's interpreter where there is no GPU.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.random_model import small_config, write_checkpoint
from tests.support.rows import Towers, params_of
from twotower.kernels import dispatch
from twotower.kernels.determinism import is_deterministic
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

OPTIONS = EngineOptions(max_num_seqs=8, max_context=64, prefix_cache_mib=0, prefill_chunk=32)
Request = tuple[list[int], GenerationParams]
# Outputs of padding are whatever memory held.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def towers_of(folder: Path, deterministic: bool, dtype: torch.dtype = torch.float32) -> Towers:
    how: dict[str, Any] = {"for_triton": True, "deterministic": deterministic}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return (
        load_context_tower(folder, device, dtype, **how),
        load_denoiser_tower(folder, device, dtype, **how),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The layers of a large model, and a shared MLP that the experts' width does not divide."""
    config = small_config(layer_pattern="M*E", moe_shared_expert_intermediate_size=12)
    return write_checkpoint(tmp_path_factory.mktemp("small"), config)


def decode(towers: Towers, requests: Sequence[Request]) -> list[list[Block]]:
    """All requests at once, through kernels, over fixed buffers as on a GPU."""
    context, denoiser = towers
    filling = DenoiserEngine(denoiser, OPTIONS, device_steps=True)
    link = LocalLink(context, filling, shared=True)
    reading = ContextEngine(context, link, OPTIONS, device_steps=True)

    async def row(index: int) -> list[Block]:
        prompt, params = requests[index]
        blocks = generate_blocks(reading, filling, f"row-{index}", prompt, params)
        return [block async for block in blocks]

    async def rows() -> list[list[Block]]:
        return list(await asyncio.gather(*map(row, range(len(requests)))))

    with dispatch.force("triton"):
        return asyncio.run(rows())


def bits(blocks: Sequence[Block]) -> list[tuple[object, ...]]:
    return [(b.token_ids, b.commit_steps, b.confidences, b.log_probs) for b in blocks]


REQUESTS: dict[str, Request] = {
    "ar": ([5, 9, 4], params_of("ar", max_tokens=2)),
    "prompt": ([7, *range(1, 18), 2], params_of("ar", max_tokens=1, temperature=0.8, seed=3)),
    "diffusion": ([3], params_of(max_tokens=3, block_size=3, steps_per_block=2, temperature=0.7)),
    "verified": ([6, 1, 6, 1], params_of("verified", max_tokens=2, block_size=2, seed=7)),
}


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
)
def test_rows_together_have_the_bits_that_they_have_alone(folder: Path, dtype: torch.dtype) -> None:
    """Prompts, steps, blocks and drafts of all lengths share passes, and passes their kernels."""
    towers = towers_of(folder, True, dtype)
    requests = list(REQUESTS.values())
    together = decode(towers, requests)
    for name, request, joint in zip(REQUESTS, requests, together, strict=True):
        assert bits(joint) == bits(decode(towers, [request])[0]), name


def test_without_the_mode_a_token_depends_on_what_is_beside_it(folder: Path) -> None:
    """The test above can fail: a token behind others, alone in its pass or beside a prompt."""
    for deterministic in (False, True):
        context, _ = towers_of(folder, deterministic)
        with dispatch.force("triton"):
            one, two, other = context.new_states(3, 16)
            for state in (one, two):
                context.forward([[5, 9, 4]], [state])
                context.advance(state, 3)
            alone = context.forward([[7]], [one])
            beside = context.forward([[7], [1, 2, 3, 4]], [two, other])[:1]
        assert torch.equal(alone, beside) == deterministic


def test_only_a_deterministic_tower_chooses_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    plain = dispatch.linear.reference

    def noted(*args: torch.Tensor) -> torch.Tensor:
        seen.append(is_deterministic())
        return plain(*args)

    monkeypatch.setattr(dispatch.linear, "reference", noted)
    for wanted in (False, True):
        context, denoiser = towers_of(folder, wanted)
        state = context.new_state(8)
        seen.clear()
        context.logits(context.forward([[1, 2]], [state]))
        denoiser.logits(denoiser.forward([[1]], [0.5], [state]))
        assert len(seen) > 6
        assert set(seen) == {wanted}
    assert not is_deterministic()
