"""Packed passes over fixed buffers: the bits of passes that the host launches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits
from tests.support.random_model import small_config, write_checkpoint
from tests.support.rows import Pair, Towers
from tests.support.rows import params_of as params_with
from twotower.kernels.dispatch import force
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.engine import context_packed
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import GRAPH_TOKENS, MAX_LENGTH
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.context_packed import TOKEN_BUCKETS, ContextPacked, shape_for
from twotower.towers.engine.cuda_graph import GraphMemory, Staging
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.request.params import GenerationParams

OPTIONS = EngineOptions(max_num_seqs=16, max_context=512, prefill_chunk=100, prefix_cache_mib=0)
CACHED = replace(OPTIONS, prefix_cache_mib=8)
Request = tuple[list[int], GenerationParams]


def params_of(mode: Any = "mask_diffusion", **changes: Any) -> GenerationParams:
    return params_with(mode, **({"max_tokens": 17} | changes))


def prompt_of(length: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, 24, (length,), generator=generator).tolist()


def pair_of(
    towers: Towers, device_steps: bool, options: EngineOptions = OPTIONS, *, shared: bool = True
) -> Pair:
    context, denoiser = towers
    pool = None if shared else options.pool_for(denoiser)
    filling = DenoiserEngine(denoiser, options, pool=pool, device_steps=device_steps)
    link = LocalLink(context, filling, shared)
    return Pair(ContextEngine(context, link, options, device_steps=device_steps), filling)


def together(pair: Pair, requests: Sequence[Request], name: str = "row") -> list[list[Block]]:
    """All requests at once."""

    async def rows() -> list[list[Block]]:
        calls = [pair.blocks(f"{name}-{i}", *request) for i, request in enumerate(requests)]
        return list(await asyncio.gather(*calls))

    return asyncio.run(rows())


def tokens_of(rows: Sequence[Sequence[Block]]) -> list[list[tuple[int, ...]]]:
    return [[block.token_ids for block in blocks] for blocks in rows]


# Several pieces and partial ones, blocks, steps and drafts beside them, draws that need the host.
MIXED: list[Request] = [
    (prompt_of(250), params_of("mask_diffusion", block_size=8)),
    (prompt_of(100, 2), params_of("ar", temperature=1.0)),
    (prompt_of(3, 3), params_of("ar", temperature=1.0, top_p=0.7)),
    (prompt_of(130, 4), params_of("mask_diffusion", block_size=5, first_token="context")),
    (prompt_of(301, 5), params_of("mock_ar")),
    (prompt_of(17, 6), params_of("verified", acceptance="mix", mix_ratio=0.5, temperature=1.0)),
    (prompt_of(64, 7), params_of("verified", block_size=16)),
    (prompt_of(1, 8), params_of("mask_diffusion", block_size=16, top_k=3, temperature=0.8)),
]


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "mirrored"])
@pytest.mark.parametrize("options", [OPTIONS, CACHED], ids=["plain", "cached"])
def test_long_prompts_beside_everything_else(
    towers: Towers, options: EngineOptions, shared: bool
) -> None:
    on_host = pair_of(towers, False)
    pair = pair_of(towers, True, options, shared=shared)
    assert together(pair, MIXED) == together(on_host, MIXED)
    again = together(pair, MIXED[:2], "again")
    assert tokens_of(again) == tokens_of(together(on_host, MIXED[:2], "again"))
    assert any(blocks[0].cached_tokens for blocks in again) is (options is CACHED)
    pair.assert_empty()


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "mirrored"])
def test_no_layer_is_launched_by_the_host(
    towers: Towers, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass launched by the host takes as long for one row as for sixty-four."""
    want = together(pair_of(towers, False), MIXED[1:7])

    def unwanted(*_: Any) -> Any:
        raise AssertionError("a pass outside all programs")

    monkeypatch.setattr(ContextTower, "read", unwanted)
    assert together(pair_of(towers, True, shared=shared), MIXED[1:7]) == want


def test_passes_that_are_too_large_are_launched_by_the_host(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And leave the programs' passes between them alone."""
    sizes, read = list[int](), ContextTower.read

    def counted(tower: ContextTower, tokens: Sequence[Sequence[int]], *args: Any) -> Any:
        sizes.append(sum(map(len, tokens)))
        return read(tower, tokens, *args)

    want = together(pair_of(towers, False), MIXED[:4])
    monkeypatch.setattr(ContextTower, "read", counted)
    monkeypatch.setattr(context_packed, "GRAPH_TOKENS", 99)
    pair = pair_of(towers, True)
    assert together(pair, MIXED[:4]) == want
    assert sizes
    assert min(sizes) > 99
    assert pair.context.stats().passes > len(sizes)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "mirrored"])
@pytest.mark.parametrize("options", [OPTIONS, CACHED], ids=["plain", "cached"])
def test_a_row_that_is_cancelled_between_its_pieces(
    towers: Towers, options: EngineOptions, shared: bool
) -> None:
    """Its neighbours get what they get alone, and nothing of it is left."""
    pair = pair_of(towers, True, options, shared=shared)
    neighbours = MIXED[1:4]

    async def rows() -> list[list[Block]]:
        doomed = asyncio.ensure_future(
            pair.blocks("doomed", prompt_of(480), params_of(block_size=8))
        )
        others = [
            asyncio.ensure_future(pair.blocks(f"{i}", *own)) for i, own in enumerate(neighbours)
        ]
        while pair.context.stats().prefill_tokens < 150:
            await asyncio.sleep(0)
        assert not doomed.done()
        doomed.cancel()
        done = await asyncio.gather(*others)
        with pytest.raises(asyncio.CancelledError):
            await doomed
        return list(done)

    got = asyncio.run(rows())
    assert tokens_of(got) == tokens_of(together(pair_of(towers, False), neighbours))
    pair.assert_empty()


def test_scores_and_logits_are_those_of_the_host(towers: Towers) -> None:
    text = prompt_of(230, 9)

    async def asked(engine: ContextEngine) -> tuple[Any, Tensor]:
        scores, logits = await asyncio.gather(engine.score(text, 3), engine.logits(text))
        return scores, logits

    got, want = (asyncio.run(asked(pair_of(towers, own).context)) for own in (True, False))
    assert got[0] == want[0]
    assert_same_bits(got[1], want[1])


def test_results_outlive_the_buffers(towers: Towers) -> None:
    """Every pass overwrites hidden states and log of the last; a row's log that stays is a copy."""
    context, _ = towers
    packed = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    first, second = context.new_states(2, 64)
    plain = context.new_state(64)
    passed = packed.read([[5, 6, 7]], [first], [None])
    first.own_log()
    hidden = passed.hidden[2].clone()
    want = context.read([[5, 6, 7]], [plain], [None])
    assert_same_bits(hidden, want.hidden[2])
    packed.read([[9, 8, 4]], [second], [None])
    for state in (first, plain):
        context.advance(state, 3)
    assert_same_bits(first.ssm, plain.ssm)
    assert_same_bits(first.conv, plain.conv)


def test_numbers_are_sent_when_the_device_has_read_the_last(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here an event stands for the device, which reads later than the host writes."""
    context, _ = towers
    packed = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    states = context.new_states(1, 64)
    packed.read([[5, 6]], states, [None])
    states[0].truncate()
    order: list[str] = []
    (program,) = packed._programs._programs.values()
    monkeypatch.setattr(program, "_sent", Mock(synchronize=lambda: order.append("has read")))
    monkeypatch.setattr(Staging, "send", lambda *_, **__: order.append("sends"))
    packed.read([[5, 6]], states, [None])
    assert order == ["has read", "sends"]


class Kept:
    """A sink that keeps what it gets without a copy."""

    takes_shares = True

    def __init__(self) -> None:
        self.got: dict[tuple[str, int], Tensor] = {}

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        assert (name, layer) not in self.got
        self.got[name, layer] = tensor

    async def finish(self) -> None:
        raise AssertionError("not here")

    def abort(self) -> None:
        raise AssertionError("not here")


def test_sinks_get_the_shares_of_a_pass_and_may_keep_them(towers: Towers) -> None:
    """Every layer's, as from a pass that the host launches; also of a single token, whose share of
    the buffers is in one piece. Rows without a sink stand between."""
    context, _ = towers
    packed = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    rows = [[5, 6, 7], [4], [9] * 20, [8]]
    got, want = ([Kept(), None, Kept(), Kept()] for _ in range(2))
    for reader, sinks in ((packed, got), (context, want)):
        states = context.new_states(4, 64)
        passed = reader.read(rows, states, sinks)
        context.advance_rows(passed, states, [3, 1, 20, 1], sinks)
    packed.read([[10] * 3, [11], [12] * 20, [13]], context.new_states(4, 64), [None] * 4)
    for own, other in zip(got, want, strict=True):
        if own is None or other is None:
            continue
        assert own.got.keys() == other.got.keys()
        for share, tensor in other.got.items():
            assert_same_bits(own.got[share], tensor, f"{share}")
    kinds = {name for sink in got if sink is not None for name, _ in sink.got}
    assert kinds == {"xbc", "dt", "conv", "ssm", "k", "v"}


def test_padding_takes_no_part(towers: Towers) -> None:
    """Whatever an earlier pass of the same shape has left in the buffers."""
    context, _ = towers
    packed = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    states = context.new_states(4, 64)
    lone = [context.new_state(64) for _ in range(2)]
    packed.read([[5] * 40, [6] * 9, [7] * 20], states[:3], [None] * 3)
    for state in states[:3]:
        state.truncate()
    tokens = [[8, 9, 4], [10] * 34]
    passed = packed.read(tokens, states[2:], [None, None])
    context.advance_rows(passed, states[2:], [3, 34], [None, None])
    for state, row, own in zip(states[2:], tokens, lone, strict=True):
        alone = context.read([row], [own], [None])
        context.advance_rows(alone, [own], [len(row)], [None])
        assert_same_bits(state.ssm, own.ssm)
        assert_same_bits(state.conv, own.conv)
    assert_same_bits(passed.hidden[36], alone.hidden[33])
    assert states[0].position == 0
    assert not bool(states[0].ssm.any())


@pytest.mark.parametrize(
    ("lengths", "want"),
    [
        ([1], (1, 1, 1)),
        ([1] * 9, (12, 12, 1)),
        ([1] * 128, (128, 128, 1)),
        ([2], (1, 16, 16)),
        ([16], (1, 16, 16)),
        ([17], (1, 32, MAX_LENGTH)),
        ([64], (1, 64, MAX_LENGTH)),
        ([65], (1, 128, 128)),
        ([1000, 20, 4], (4, 1024, 1024)),
        ([1024], (1, 1024, 1024)),
        ([1024, 1], (4, 1536, 1536)),
        ([1024, 1024], (4, GRAPH_TOKENS, GRAPH_TOKENS)),
        ([1024, 1024, 1], None),
        ([16] * 128, (128, GRAPH_TOKENS, 16)),
        ([16] * 129, None),
        ([1] * 129, None),
        # Attention's partial results of 33 rows would be larger than those of any block's graph.
        ([64] * 31, (32, GRAPH_TOKENS, MAX_LENGTH)),
        ([65, *[1] * 31], (32, 128, 128)),
        ([65, *[1] * 32], None),
    ],
)
def test_the_program_of_a_pass(lengths: list[int], want: tuple[int, int, int] | None) -> None:
    assert shape_for(lengths) == want


def test_a_row_finds_the_kernels_that_it_would_find_alone() -> None:
    """Kernels differ for rows of 1, up to 16, up to 64 and more tokens."""

    def kind(tokens: int) -> int:
        return sum(tokens > most for most in (1, 16, MAX_LENGTH))

    for tokens in range(1, GRAPH_TOKENS + 1):
        shape = shape_for([tokens])
        assert shape is not None
        assert kind(shape[2]) == kind(tokens)
        assert tokens <= min(shape[1:])


def test_what_is_warmed_up_is_what_prompts_need(towers: Towers) -> None:
    context, _ = towers
    packed = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    pool = OPTIONS.pool_for(context)
    packed.warm_up(pool, 1024, 5120)
    warm = {*packed._programs._programs}
    assert {shape_for([tokens]) for tokens in range(2, 1025)} <= warm
    for tokens in range(1025, GRAPH_TOKENS + 1):
        assert shape_for([1024, tokens - 1024]) in warm
    assert len(warm) == 15

    small = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    small.warm_up(pool, 64, 320)
    assert max(shape[1] for shape in small._programs._programs) == 512
    alone = ContextPacked(context, GraphMemory(context.device), BlockLog(context))
    alone.warm_up(replace(OPTIONS, max_num_seqs=1).pool_for(context), 5000, 9000)
    assert {shape[0] for shape in alone._programs._programs} == {1}
    assert len(alone._programs) == len(TOKEN_BUCKETS)


# Padding's tokens hold whatever stood in memory; numpy, here the interpreter's, warns of that.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_with_the_kernels_instead_of_the_references(tmp_path: Path) -> None:
    """Pieces long enough to be scanned by chunks side by side, and a short one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = write_checkpoint(tmp_path, small_config(layer_pattern="M*E"))
    kernels = (
        load_context_tower(folder, device, for_triton=True),
        load_denoiser_tower(folder, device, for_triton=True),
    )
    request = (prompt_of(75), params_of("ar", max_tokens=2, temperature=0.8))
    options = replace(OPTIONS, prefill_chunk=70)
    with force("triton"):
        got = together(pair_of(kernels, True, options), [request])
    references = load_context_tower(folder), load_denoiser_tower(folder)
    want = together(pair_of(references, False, options), [request])
    assert tokens_of(got) == tokens_of(want)


def test_generation_streams_while_a_long_prompt_is_read(towers: Towers) -> None:
    """Blocks of a row come between the pieces of another's prompt."""
    pair = pair_of(towers, True, replace(OPTIONS, prefill_chunk=16, max_prefill_tokens=16))
    events: list[str] = []

    async def short() -> None:
        request = ([5, 6], params_of(block_size=4, max_tokens=24))
        async for _ in generate_blocks(pair.context, pair.denoiser, "short", *request):
            events.append("block")

    async def long() -> None:
        prompt, params = prompt_of(400), params_of(max_tokens=4)
        async for _ in generate_blocks(pair.context, pair.denoiser, "long", prompt, params):
            events.append("long")

    async def both() -> None:
        await asyncio.gather(short(), long())

    asyncio.run(both())
    assert events.index("long") >= 3
    pair.assert_empty()
