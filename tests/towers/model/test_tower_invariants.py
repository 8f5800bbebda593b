"""What both towers keep, whatever their weights: rows alone, states untouched, cuts anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from tests.support.comparing import BATCH_SIZES, assert_relative_rms, assert_same_bits
from twotower.kernels import dispatch
from twotower.kernels.rows import Rows
from twotower.towers.model.backbone import MixerInputs, Tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower, timestep_features
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import PAGE_TOKENS
from twotower.towers.state.pool import StatePool
from twotower.towers.state.update import StateUpdate, UpdatePlan, plan_update

ROWS = max(BATCH_SIZES)
ATTENTION_LAYERS = 2  # of both recorded models
SOME_SIZES = [1, 2, 3, 4, 7, 15, 16, 17, 23, 31, 32, 33, 40]


def tokens(count: int, seed: int, vocab_size: int = 300) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    drawn: list[int] = torch.randint(0, vocab_size, (count,), generator=generator).tolist()
    return drawn


def read(tower: ContextTower, prompt: Sequence[int], room: int = 40) -> ContextState:
    """A state that has read a prompt."""
    state = tower.new_state(len(prompt) + room)
    fill(tower, state, prompt)
    return state


def fill(tower: ContextTower, state: ContextState, prompt: Sequence[int]) -> None:
    if prompt:
        tower.forward([prompt], [state])
        tower.advance(state, len(prompt))


def read_all(tower: ContextTower, prompts: Sequence[Sequence[int]]) -> list[ContextState]:
    """States that have read a prompt each, one after the other, in one pool."""
    states = tower.new_states(len(prompts), max(map(len, prompts)) + 40)
    for state, prompt in zip(states, prompts, strict=True):
        fill(tower, state, prompt)
    return states


def everything(state: ContextState) -> list[Tensor]:
    parts = [state.conv, state.ssm]
    for layer in range(ATTENTION_LAYERS):
        parts += state.kv(layer, 0, state.length)
    return [part.clone() for part in parts]


def test_a_context_row_has_the_same_bits_in_any_batch(context_tower: ContextTower) -> None:
    prompts = [tokens(3 * (row % 5), seed=row) for row in range(ROWS)]
    pieces = [tokens(1 + row % 7, seed=50 + row) for row in range(ROWS)]
    alone, after = [], []
    for prompt, piece in zip(prompts, pieces, strict=True):
        state = read(context_tower, prompt)
        alone.append(context_tower.forward([piece], [state]))
        context_tower.advance(state, len(piece))
        after.append(everything(state))
    for size in SOME_SIZES:
        states = read_all(context_tower, prompts[:size])
        together = context_tower.forward(pieces[:size], states)
        assert_same_bits(together, torch.cat(alone[:size]), size)
        for state, piece, want in zip(states, pieces, after, strict=False):
            context_tower.advance(state, len(piece))
            for got, own in zip(everything(state), want, strict=True):
                assert_same_bits(got, own, size)


def test_a_denoiser_row_has_the_same_bits_in_any_batch(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    states = read_all(context_tower, [tokens(3 * (row % 5), seed=row) for row in range(ROWS)])
    blocks = [tokens([16, 16, 8, 1, 5][row % 5], seed=90 + row) for row in range(ROWS)]
    times = [None if row % 7 == 6 else (row % 16 + 1) / 16 for row in range(ROWS)]
    alone = [
        denoiser_tower.forward([block], [t], [state])
        for block, t, state in zip(blocks, times, states, strict=True)
    ]
    for size in SOME_SIZES:
        together = denoiser_tower.forward(blocks[:size], times[:size], states[:size])
        assert_same_bits(together, torch.cat(alone[:size]), size)
        last = denoiser_tower.forward(blocks[-size:], times[-size:], states[-size:])
        assert_same_bits(last, torch.cat(alone[-size:]), size)


@pytest.mark.parametrize("prompt_length", [0, 1, 40])
@pytest.mark.parametrize("log", [0, 1])
def test_the_denoiser_leaves_the_state_untouched(
    context_tower: ContextTower, denoiser_tower: DenoiserTower, prompt_length: int, log: int
) -> None:
    state = read(context_tower, tokens(prompt_length, seed=1))
    if log:
        context_tower.forward([tokens(1, seed=2)], [state])
    before, position, length = everything(state), state.position, state.length
    for block, t in ((16, 1.0), (1, None), (33, 0.5)):
        denoiser_tower.forward([tokens(block, seed=3)], [t], [state])
    for got, want in zip(everything(state), before, strict=True):
        assert_same_bits(got, want)
    assert (state.position, state.length) == (position, length)


def test_the_denoiser_reads_the_snapshot_and_not_the_log(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    """mock_ar keeps its last token in the log and wants the context before it."""
    prompt = tokens(20, seed=1)
    state = read(context_tower, prompt)
    block = tokens(1, seed=2)
    before = denoiser_tower.forward([block], [None], [state])
    context_tower.forward([block], [state])
    assert_same_bits(denoiser_tower.forward([block], [None], [state]), before)
    context_tower.advance(state, 1)
    assert not torch.equal(denoiser_tower.forward([block], [None], [state]), before)


@pytest.mark.parametrize("cut", [1, 2, 3, 16, 31, 39])
def test_reading_a_then_b_is_reading_both(context_tower: ContextTower, cut: int) -> None:
    whole = tokens(40, seed=5)
    at_once, in_two = context_tower.new_state(60), read(context_tower, whole[:cut], room=50)
    hidden = context_tower.forward([whole], [at_once])
    context_tower.advance(at_once, 40)
    tail = context_tower.forward([whole[cut:]], [in_two])
    context_tower.advance(in_two, 40 - cut)
    assert_relative_rms(tail, hidden[cut:], 2e-5)
    for got, want in zip(everything(in_two), everything(at_once), strict=True):
        assert_relative_rms(got, want, 2e-5)
    follow = tokens(3, seed=6)
    left = context_tower.forward([follow], [at_once])
    assert_relative_rms(context_tower.forward([follow], [in_two]), left, 2e-5)


def test_scattered_pages_change_no_bit(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    """Rows that were opened and closed in turns have pages anywhere in the pool."""
    prompt, block = tokens(150, seed=1), tokens(16, seed=2)
    plain = read(context_tower, prompt)
    pool = StatePool(context_tower.config, 4, 6, context_tower.device, context_tower.dtype)
    # A pool full of garbage: what is behind a row's tokens must not matter.
    pool.k.fill_(float("nan"))
    pool.v.fill_(float("nan"))
    others = [pool.open(64) for _ in range(4)]
    for other in (others[0], others[2]):
        pool.close(other)
    state = pool.open(190)
    assert state.pages == [0, 2, 4]
    context_tower.forward([prompt], [state])
    context_tower.advance(state, len(prompt))
    for got, want in zip(everything(state), everything(plain), strict=True):
        assert_same_bits(got, want)
    want = denoiser_tower.forward([block], [0.5], [plain])
    assert_same_bits(denoiser_tower.forward([block], [0.5], [state]), want)
    want = context_tower.forward([block], [plain])
    assert_same_bits(context_tower.forward([block], [state]), want)


class Shares:
    """A sink that remembers in which order it got what."""

    def __init__(self, takes_shares: bool = True) -> None:
        self.takes_shares = takes_shares
        self.got: list[tuple[str, int, Tensor]] = []

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self.got.append((name, layer, tensor.clone()))


def test_a_sink_takes_each_layers_share_in_the_order_of_the_layers(
    context_tower: ContextTower,
) -> None:
    pieces = [tokens(5, seed=2), tokens(16, seed=3), tokens(16, seed=4)]
    states = read_all(context_tower, [tokens(9, seed=row) for row in range(3)])
    sinks = [Shares(), None, Shares()]
    passed = context_tower.read(pieces, states, sinks)
    config = context_tower.config
    names = {"M": ("xbc", "dt"), "*": ("k", "v")}
    order = [
        (name, config.layer_pattern[:index].count(kind))
        for index, kind in enumerate(config.layer_pattern)
        for name in names.get(kind, ())
    ]
    takers = [Shares(), Shares(), Shares()]
    context_tower.advance_rows(passed, states, list(map(len, pieces)), takers)
    for sink, taken, state, piece in zip(sinks, takers, states, pieces, strict=True):
        mamba = range(config.layer_pattern.count("M"))
        assert [(name, layer) for name, layer, _ in taken.got] == [
            (name, layer) for layer in mamba for name in ("conv", "ssm")
        ]
        for name, layer, tensor in taken.got:
            assert_same_bits(tensor, getattr(state, name)[layer])
        if sink is None:
            continue
        assert [(name, layer) for name, layer, _ in sink.got] == order
        mirror_follows_shares(context_tower, state, sink, len(piece))


def test_a_sink_that_takes_no_shares_makes_no_work(
    context_tower: ContextTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Towers that share their states replay all layers at once, as where nobody follows."""
    pieces = [tokens(5, seed=2), tokens(16, seed=3)]
    replay, layers = dispatch.replay, []

    def counted(ssm: Tensor, *args: Any) -> None:
        layers.append(ssm.shape[1])
        replay(ssm, *args)

    monkeypatch.setattr(dispatch, "replay", counted)
    ends = []
    for sinks in ([], [Shares(takes_shares=False) for _ in pieces]):
        states = read_all(context_tower, [tokens(9, seed=row) for row in range(2)])
        layers.clear()
        passed = context_tower.read(pieces, states, sinks)
        taken = sinks or [None, None]
        context_tower.advance_rows(passed, states, list(map(len, pieces)), taken)
        assert layers == [context_tower.config.layer_pattern.count("M")]
        assert all(not sink.got for sink in sinks)
        ends.append([everything(state) for state in states])
    for got, want in zip(*ends, strict=True):
        for own, other in zip(got, want, strict=True):
            assert_same_bits(own, other)


def mirror_follows_shares(
    tower: ContextTower, state: ContextState, sink: Shares, count: int
) -> None:
    """The shares are a delta that moves a mirror of the nine tokens before to the state's bits."""
    tensors = {
        name: [part for own, _, part in sink.got if own == name] for name in ("xbc", "dt", "k", "v")
    }
    mirror = read(tower, tokens(9, seed=0 if count == 5 else 2))
    mirror.apply(StateUpdate(UpdatePlan("delta", 9, 9 + count), tensors), tower.replay_weights)
    for got, want in zip(everything(mirror), everything(state), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("sinks", ["none", "some", "all"])
@pytest.mark.parametrize("counts", [[5, 16, 16, 1], [2, 0, 16, 1], [0, 0, 0, 0]])
def test_rows_advance_together_as_they_do_alone(
    context_tower: ContextTower, counts: list[int], sinks: str
) -> None:
    pieces = [tokens(length, seed=length) for length in (5, 16, 16, 1)]
    prompts = [tokens(9 * row, seed=row) for row in range(4)]
    together, alone = (read_all(context_tower, prompts) for _ in range(2))
    passed = context_tower.read(pieces, together)
    context_tower.forward(pieces, alone)
    takers = [
        Shares() if sinks == "all" or (sinks == "some" and row % 2) else None for row in range(4)
    ]
    for state in (*together, *alone):
        state.follow()
    context_tower.advance_rows(passed, together, counts, takers)
    for row, (state, want, count) in enumerate(zip(together, alone, counts, strict=True)):
        context_tower.advance(want, count)
        assert (state.position, state.length) == (want.position, want.length)
        for got, own in zip(everything(state), everything(want), strict=True):
            assert_same_bits(got, own, row)
        start = len(prompts[row])
        updates = [own_state.export(start) for own_state in (state, want)]
        if count:
            assert updates[1].plan == plan_update(context_tower.config, start, start + count)
        # A link that has taken the shares needs no delta; without one it is kept.
        if takers[row] is not None:
            assert updates[0].plan.kind == "snapshot"
        else:
            assert updates[0].plan == updates[1].plan
            for left, right in zip(updates[0].parts(), updates[1].parts(), strict=True):
                assert left[:2] == right[:2]
                assert_same_bits(left[2], right[2], row)
        # What is left of the log can be replayed later.
        for own_state in (state, want):
            context_tower.advance(own_state, len(pieces[row]) - count)
        assert_same_bits(state.ssm, want.ssm, row)
        assert_same_bits(state.conv, want.conv, row)


@pytest.mark.parametrize("padding", [[0], [1, 3], [0, 2, 4]])
def test_padding_in_a_pass_changes_no_row_and_no_state(
    context_tower: ContextTower, denoiser_tower: DenoiserTower, padding: list[int]
) -> None:
    """Rows without a slot among the others, as in a pass of a fixed size."""
    states = read_all(context_tower, [tokens(9 * row, seed=row) for row in range(5)])
    pool, lengths = states[0].pool, [3, 3, 16, 1, 3]
    ids = context_tower.pack([tokens(length, seed=50 + length) for length in lengths])
    slots = [-1 if row in padding else state.slot for row, state in enumerate(states)]
    rows, padded = (
        Rows.build(lengths, own, [9 * row for row in range(5)], pool.page_table, PAGE_TOKENS)
        for own in ([state.slot for state in states], slots)
    )
    table = denoiser_tower.modulation(0.5)[None]
    index = torch.zeros(1, dtype=torch.int64)
    with torch.inference_mode():
        want = denoiser_tower.run(ids, table, index, MixerInputs(rows, pool, False))
        got = denoiser_tower.run(ids, table, index, MixerInputs(padded, pool, False))
        # The causal pass writes: what the padding's own rows hold must stay.
        before = [everything(state) for state in states]
        stored = pool.k.clone(), pool.v.clone()
        log = context_tower.new_log(len(ids))
        causal = context_tower.run(ids, MixerInputs(padded, pool, True), log)
    kept = [row for row in range(5) if row not in padding]
    for row in kept:
        own = rows.host.slice_of(row)
        assert_same_bits(got[own], want[own], row)
        alone = context_tower.forward([ids[own].tolist()], [states[row]])
        assert_same_bits(causal[own], alone, row)
    written = [place for row in kept for place in places(states[row], 9 * row, lengths[row])]
    others = torch.ones(pool.k.shape[2], dtype=torch.bool)
    others[written] = False
    for pool_part, old in zip((pool.k, pool.v), stored, strict=True):
        assert_same_bits(pool_part[:, :, others], old[:, :, others])
    for row in padding:
        for now, old_part in zip(everything(states[row]), before[row], strict=True):
            assert_same_bits(now, old_part, row)


def places(state: ContextState, start: int, count: int) -> list[int]:
    """Where tokens of a row stand in its pool."""
    return [
        state.pages[token // PAGE_TOKENS] * PAGE_TOKENS + token % PAGE_TOKENS
        for token in range(start, start + count)
    ]


def test_states_of_one_pass_share_a_pool(context_tower: ContextTower) -> None:
    states = [context_tower.new_state(10) for _ in range(2)]
    with pytest.raises(AssertionError, match="states of one pass share a pool"):
        context_tower.forward([[1], [2]], states)


def test_a_forward_pass_does_not_move_the_snapshot(context_tower: ContextTower) -> None:
    state = read(context_tower, tokens(10, seed=1))
    ssm, conv = state.ssm.clone(), state.conv.clone()
    context_tower.forward([tokens(7, seed=2)], [state])
    assert (state.position, state.length) == (10, 17)
    assert_same_bits(state.ssm, ssm)
    assert_same_bits(state.conv, conv)


def test_a_context_token_does_not_see_those_after_it(context_tower: ContextTower) -> None:
    first, second = tokens(20, seed=1), tokens(20, seed=1)
    second[12:] = tokens(8, seed=2)
    left = context_tower.forward([first], [context_tower.new_state(20)])
    right = context_tower.forward([second], [context_tower.new_state(20)])
    assert_same_bits(left[:12], right[:12])
    assert not torch.equal(left[12:], right[12:])


def test_every_token_of_a_block_sees_the_whole_block(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    state = read(context_tower, tokens(9, seed=1))
    block = tokens(16, seed=2)
    before = denoiser_tower.forward([block], [0.5], [state])
    block[15] = (block[15] + 1) % 300
    after = denoiser_tower.forward([block], [0.5], [state])
    assert bool((before != after).any(dim=1).all())


def test_t_changes_the_result_and_none_is_not_zero(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    state = read(context_tower, tokens(9, seed=1))
    block = tokens(8, seed=2)
    results = [denoiser_tower.forward([block], [t], [state]) for t in (None, 0.0, 0.5, 1.0)]
    for i, left in enumerate(results):
        for right in results[i + 1 :]:
            assert float((left - right).abs().max()) > 1e-3


def test_a_timesteps_features_are_cosines_then_sines_of_two_constants() -> None:
    got = timestep_features(0.37, torch.float32, torch.device("cpu"))[0].double()
    index = torch.arange(128, dtype=torch.float64)
    angles = 370.0 * 10000.0 ** (-index / 128)
    want = torch.cat((angles.cos(), angles.sin()))
    assert float((got - want).abs().max()) < 1e-4


@pytest.mark.parametrize(("n", "scaled"), [(3, 188.0), (5, 312.0), (11, 688.0), (16, 1000.0)])
def test_in_bf16_the_scaled_timestep_is_rounded_as_in_training(n: int, scaled: float) -> None:
    got = timestep_features(n / 16, torch.bfloat16, torch.device("cpu"))[0]
    index = torch.arange(128, dtype=torch.float64)
    angles = scaled * 10000.0 ** (-index / 128)
    want = torch.cat((angles.cos(), angles.sin()))
    assert float((got.double() - want).abs().max()) < 5e-3


def test_the_cache_of_timesteps_is_bounded_and_right(denoiser_tower: DenoiserTower) -> None:
    first = denoiser_tower.modulation(0.123).clone()
    for n in range(600):
        denoiser_tower.modulation(n / 600)
    assert len(denoiser_tower._modulations) <= 256
    assert_same_bits(denoiser_tower.modulation(0.123), first)


def test_an_observer_sees_every_layer_and_changes_nothing(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    state, block = read(context_tower, tokens(9, seed=1)), tokens(8, seed=2)
    seen: dict[str, tuple[int, ...]] = {}

    def observe(name: str, value: Tensor) -> None:
        seen[name] = tuple(value.shape)

    watched = denoiser_tower.forward([block], [0.5], [state], observe)
    assert_same_bits(watched, denoiser_tower.forward([block], [0.5], [state]))
    layers = range(denoiser_tower.config.num_layers)
    names = {f"{name}.{i}" for i in layers for name in ("hidden_in", "mixer_in")}
    assert set(seen) == names | {"hidden_out"}
    assert set(seen.values()) == {(8, denoiser_tower.config.hidden_size)}


@pytest.fixture
def bf16_sums() -> Iterator[None]:
    """Torch may sum parts of bf16 products in bf16, as it does unless told otherwise."""
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction
    products.allow_bf16_reduced_precision_reduction = True
    yield
    products.allow_bf16_reduced_precision_reduction = before


@pytest.mark.usefixtures("bf16_sums")
def test_on_a_gpu_partial_sums_stay_in_fp32(context_tower: ContextTower) -> None:
    products = torch.backends.cuda.matmul
    Tower(context_tower.config, context_tower.weights)
    assert products.allow_bf16_reduced_precision_reduction

    class OnCuda:
        device, dtype = torch.device("cuda"), torch.bfloat16

    weights = replace(context_tower.weights, embedding=cast(Tensor, OnCuda()))
    Tower(context_tower.config, weights)
    assert not products.allow_bf16_reduced_precision_reduction
