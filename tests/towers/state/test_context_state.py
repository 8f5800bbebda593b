"""A row's context state: log, snapshot and updates to a mirror."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits, normal
from tests.support.random_model import SMALL
from twotower.kernels.attention import attention, store_kv
from twotower.kernels.replay import ReplayWeights, replay
from twotower.kernels.rows import Rows
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.state.context_state import ContextState, rows_of
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.pool import StatePool
from twotower.towers.state.update import (
    StateUpdate,
    UpdateKind,
    UpdatePlan,
    most_delta_tokens,
)

WEIGHTS = ReplayWeights(
    normal(1, SMALL.conv_dim, 4, seed=1),
    None,
    normal(1, 4, seed=2),
    normal(1, 4, seed=3),
    SMALL.n_groups,
)
CPU = torch.device("cpu")


def new_state(
    capacity: int = 12, config: TwoTowerConfig = SMALL, dtype: torch.dtype = torch.float32
) -> ContextState:
    """An empty state; its pool has another row's pages in the middle and NaN in all."""
    pool = StatePool(config, 2, 8, CPU, dtype)
    pool.k.fill_(float("nan"))
    pool.v.fill_(float("nan"))
    first, second = pool.open(64), pool.open(64)
    pool.close(first)
    state = pool.open(capacity)
    assert second.pages == [1]
    return state


def filled(tokens: int, seed: int = 5, capacity: int = 12) -> ContextState:
    """A state with a log of some tokens and their K/V."""
    state = new_state(capacity)
    read(state, tokens, seed)
    return state


def read(state: ContextState, tokens: int, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Does what a pass over some tokens does; the K and V that it wrote."""
    k, v = normal(2, tokens, 4, seed=seed + 2), normal(2, tokens, 4, seed=seed + 3)
    state.write_kv(0, k, v)
    state.append(log_of(tokens, seed), tokens)
    return k, v


def log_of(tokens: int, seed: int) -> PassLog:
    """The log of the one Mamba layer."""
    xbc, dt = normal(tokens, SMALL.conv_dim, seed=seed), normal(tokens, 4, seed=seed + 1)
    return PassLog(xbc[None], dt[None])


def snapshot_of(state: ContextState, start: int, stop: int) -> dict[str, list[Tensor]]:
    k, v = state.kv(0, start, stop)
    return {"conv": list(state.conv), "ssm": list(state.ssm), "k": [k], "v": [v]}


def kv_update(state: ContextState, start: int, stop: int) -> StateUpdate:
    k, v = state.kv(0, start, stop)
    return StateUpdate(UpdatePlan("kv", start, stop), {"k": [k], "v": [v]})


def assert_equal_states(got: ContextState, want: ContextState) -> None:
    assert (got.position, got.length) == (want.position, want.length)
    assert_same_bits(got.ssm, want.ssm)
    assert_same_bits(got.conv, want.conv)
    for left, right in zip(got.kv(0, 0, got.length), want.kv(0, 0, want.length), strict=True):
        assert_same_bits(left, right)


def test_an_empty_state() -> None:
    state = new_state()
    assert state.position == state.length == 0
    assert state.capacity == 12
    assert state.conv.shape == (1, 3, 32)
    assert state.ssm.shape == (1, 4, 4, 4)
    assert not state.conv.any()
    assert not state.ssm.any()
    assert state.pages == [0]
    assert state.num_bytes == 4 * (3 * 32 + 4 * 4 * 4 + 2 * 2 * 64 * 4)


def test_the_states_stay_fp32_in_a_bf16_model() -> None:
    state = new_state(dtype=torch.bfloat16)
    assert state.ssm.dtype == torch.float32
    k, v = state.kv(0, 0, 0)
    assert state.conv.dtype == k.dtype == v.dtype == torch.bfloat16


def test_a_log_counts_until_it_is_replayed() -> None:
    state = filled(5)
    empty = new_state().num_bytes
    assert (state.position, state.length) == (0, 5)
    assert state.num_bytes == empty + 4 * 5 * (32 + 4)
    state.advance(WEIGHTS, 2)
    assert (state.position, state.length) == (2, 5)
    assert state.num_bytes == empty + 4 * 3 * (32 + 4)
    state.advance(WEIGHTS, 0)
    state.advance(WEIGHTS, 3)
    assert (state.position, state.length) == (5, 5)
    assert state.num_bytes == empty


@pytest.mark.parametrize(
    "why",
    ["nobody follows", "no shares are taken", "it was streamed", "a snapshot is smaller"],
)
def test_a_replayed_log_is_not_kept_without_need(why: str) -> None:
    # SMALL's snapshot has 160 values, a token's log 36: a delta has at most 4 tokens.
    state = filled(5)
    empty = new_state().num_bytes
    if why != "nobody follows":
        state.follow(takes_shares=why != "no shares are taken")
    if why == "it was streamed":
        state.advanced(4, exported=True)
    elif why == "a snapshot is smaller":
        state.advance(WEIGHTS, 4)
        assert state.keeps_log
        assert state.num_bytes == empty + 4 * (4 + 1) * (32 + 4)
        state.advance(WEIGHTS, 1)
    else:
        state.advance(WEIGHTS, 4)
    state.truncate()
    assert not state.keeps_log
    assert state.num_bytes == empty
    assert state.export(0).plan == UpdatePlan("snapshot", 0, state.position)


def test_what_is_kept_of_a_pass_does_not_hold_the_whole_pass() -> None:
    """A row's log is a view of all rows' projections; what outlives the pass is a copy."""
    whole = log_of(40, 5)
    state = new_state()
    state.append(whole.part(8, 13), 5)
    state.own_log()
    whole.xbc.fill_(float("nan"))
    whole.dt.fill_(float("nan"))
    want = new_state()
    want.append(log_of(40, 5).part(8, 13), 5)
    for own in (state, want):
        own.advance(WEIGHTS, 2)
    assert_same_bits(state.ssm, want.ssm)
    # The delta and the rest of the log, too, are there when the pass is gone.
    log = log_of(40, 5)
    kept = new_state()
    kept.follow()
    kept.append(log.part(8, 13), 5)
    kept.advance(WEIGHTS, 2)
    log.xbc.fill_(float("nan"))
    log.dt.fill_(float("nan"))
    for name, shares in kept.export(0).tensors.items():
        if name in ("xbc", "dt"):
            assert_same_bits(shares[0], getattr(log_of(40, 5), name)[0, 8:10])
    for own in (kept, want):
        own.advance(WEIGHTS, 3)
    assert_same_bits(kept.ssm, want.ssm)


def test_a_step_moves_snapshot_and_kv_by_one_token() -> None:
    """The pass has moved the snapshot itself: nothing is left to replay or to send."""
    state = filled(2)
    with pytest.raises(AssertionError):
        state.stepped()
    state.advance(WEIGHTS, 2)
    before, empty = state.ssm.clone(), new_state().num_bytes
    state.stepped()
    assert (state.position, state.length) == (3, 3)
    assert state.num_bytes == empty
    assert state.export(2).plan == UpdatePlan("snapshot", 2, 3)
    assert_same_bits(state.ssm, before)
    full = filled(12)
    full.advance(WEIGHTS, 12)
    with pytest.raises(AssertionError):
        full.stepped()


@pytest.mark.parametrize("cut", range(6))
def test_advancing_is_the_replay_of_the_log_however_it_is_cut(cut: int) -> None:
    state, log = filled(5), log_of(5, 5)
    ssm, conv = torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 3, 32)
    rows = Rows.build([5], [0], [0], torch.zeros(1, 1, dtype=torch.int32), 64)
    replay(ssm, conv, log.xbc, log.dt, WEIGHTS, rows, torch.tensor([5], dtype=torch.int32))
    state.advance(WEIGHTS, cut)
    state.advance(WEIGHTS, 5 - cut)
    assert_same_bits(state.ssm, ssm[0])
    assert_same_bits(state.conv, conv[0])
    # The other row of the pool is where it was.
    assert not state.pool.ssm[1 - state.slot].any()


def test_kv_across_scattered_pages() -> None:
    pool = StatePool(SMALL, 7, 7, CPU, torch.float32)
    others = [pool.open(64) for _ in range(6)]
    for other in others[::2]:
        pool.close(other)
    state = pool.open(200)
    assert state.pages == [0, 2, 4, 6]
    parts = [read_all(state, tokens, seed) for seed, tokens in enumerate((63, 2, 64, 1, 70))]
    whole_k, whole_v = (torch.cat(own, dim=1) for own in zip(*parts, strict=True))
    for start, stop in ((0, 200), (0, 0), (63, 65), (64, 128), (100, 199)):
        k, v = state.kv(0, start, stop)
        assert_same_bits(k, whole_k[:, start:stop])
        assert_same_bits(v, whole_v[:, start:stop])
    assert_attention_sees(state, whole_k[:, :130], whole_v[:, :130])
    # The operators write where the state reads.
    more_k, more_v = normal(70, 2, 4, seed=8), normal(70, 2, 4, seed=9)
    store_kv(more_k, more_v, pool.layer_kv(0), rows_of([state], [70], [130]))
    k, v = state.kv(0, 0, 200)
    assert_same_bits(k, torch.cat((whole_k[:, :130], more_k.transpose(0, 1)), dim=1))
    assert_same_bits(v, torch.cat((whole_v[:, :130], more_v.transpose(0, 1)), dim=1))


def assert_attention_sees(state: ContextState, k: Tensor, v: Tensor) -> None:
    """Attention over the state's pages has the bits of that over these K/V in one piece."""
    q, own_k, own_v = normal(3, 4, 4), normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2)
    count, pool = k.shape[1], state.pool
    got = attention(q, own_k, own_v, pool.layer_kv(0), rows_of([state], [3], [count]), False)
    plain = StatePool(SMALL, 1, 4, CPU, torch.float32)
    whole = plain.open(count)
    whole.write_kv(0, k, v)
    want = attention(q, own_k, own_v, plain.layer_kv(0), rows_of([whole], [3], [count]), False)
    assert_same_bits(got, want)


def read_all(state: ContextState, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    written = read(state, tokens, 10 * seed)
    state.advance(WEIGHTS, tokens)
    return written


def test_truncating_drops_what_was_not_replayed() -> None:
    state, want = filled(5), filled(5)
    empty = new_state().num_bytes
    state.follow()
    state.advance(WEIGHTS, 2)
    state.truncate()
    assert (state.position, state.length) == (2, 2)
    # The delta of what was replayed is still to be had.
    assert state.num_bytes == empty + 4 * 2 * (32 + 4)
    mirror = new_state()
    mirror.apply(state.export(0), WEIGHTS)
    assert_equal_states(mirror, state)
    # The next pass writes where the dropped tokens stood.
    k, _ = read(state, 3, seed=40)
    assert_same_bits(state.kv(0, 2, 5)[0], k)
    assert_same_bits(state.kv(0, 0, 2)[0], want.kv(0, 0, 2)[0])


def test_a_mirror_follows_update_by_update() -> None:
    state, mirror = filled(5), new_state()
    state.advance(WEIGHTS, 3)
    mirror.apply(state.export(0), WEIGHTS)
    assert (mirror.position, mirror.length) == (3, 3)
    state.follow()
    state.advance(WEIGHTS, 2)
    update = state.export(3)
    assert update.plan == UpdatePlan("delta", 3, 5)
    mirror.apply(update, WEIGHTS)
    assert mirror.position == 5
    assert_equal_states(mirror, state)
    # A copy: what happens to the one later leaves the other alone.
    state.ssm.zero_()
    assert bool(mirror.ssm.any())


def test_kv_may_run_ahead_of_the_snapshot() -> None:
    state, mirror = filled(11), new_state()
    state.advance(WEIGHTS, 11)
    mirror.apply(kv_update(state, 0, 4))
    assert (mirror.position, mirror.length) == (0, 4)
    mirror.apply(kv_update(state, 4, 9))
    assert (mirror.position, mirror.length) == (0, 9)
    assert not mirror.ssm.any()
    plan = UpdatePlan("snapshot", 9, 11)
    mirror.apply(StateUpdate(plan, snapshot_of(state, 9, 11)))
    assert_equal_states(mirror, state)


def test_a_delta_is_sent_where_it_is_the_smaller_one() -> None:
    state, mirror = filled(1), new_state()
    state.follow()
    state.advance(WEIGHTS, 1)
    update = state.export(0)
    assert update.plan == UpdatePlan("delta", 0, 1)
    assert set(update.tensors) == {"xbc", "dt", "k", "v"}
    assert [share.shape for share in update.tensors["xbc"]] == [(1, SMALL.conv_dim)]
    snapshot = sum(tensor.nbytes for tensor in (state.conv, state.ssm))
    assert update.num_bytes < snapshot
    with pytest.raises(ValueError, match="got a delta, expected a snapshot"):
        mirror.apply(update)
    assert not bool(mirror.ssm.any())
    mirror.apply(update, WEIGHTS)
    assert_equal_states(mirror, state)
    # Once the mirror has it, it is not kept.
    state.follow()
    assert state.num_bytes == new_state().num_bytes
    assert state.export(0).plan.kind == "snapshot"


@pytest.mark.parametrize("start", [0, 2])
def test_a_delta_that_does_not_begin_at_the_mirror_is_not_made(start: int) -> None:
    state = filled(3)
    state.advance(WEIGHTS, 1)
    state.follow()
    state.advance(WEIGHTS, 2)
    assert state.plan(1) == UpdatePlan("delta", 1, 3)
    assert state.export(start).plan == UpdatePlan("snapshot", start, 3)
    assert set(state.export(start).tensors) == {"conv", "ssm", "k", "v"}


def step(state: ContextState, seed: int) -> None:
    """Does what a pass over fixed buffers does with one token; its buffers change afterwards."""
    state.write_kv(0, normal(2, 1, 4, seed=seed + 2), normal(2, 1, 4, seed=seed + 3))
    log = log_of(1, seed)
    weights, rows = WEIGHTS, rows_of([state], [1], [state.length])
    log.replay(state.pool, weights, rows, torch.tensor([1], dtype=torch.int32))
    state.stepped(log=log)
    log.xbc.fill_(float("nan"))
    log.dt.fill_(float("nan"))


def test_one_delta_covers_several_rounds_of_any_kind() -> None:
    """Drafts of which a part is kept, and single steps."""
    state, mirror = new_state(16), new_state(16)
    read_all(state, 5, seed=1)
    mirror.apply(state.export(0), WEIGHTS)
    state.follow()
    read(state, 3, seed=20)
    state.advance(WEIGHTS, 2)
    state.truncate()
    step(state, seed=30)
    read(state, 2, seed=40)
    state.truncate()
    read_all(state, 1, seed=5)
    update = state.export(5)
    assert update.plan == UpdatePlan("delta", 5, 9)
    assert update.num_bytes == 4 * 4 * (32 + 4 + 2 * 2 * 4)
    mirror.apply(update, WEIGHTS)
    assert_equal_states(mirror, state)
    # With one token more a snapshot is smaller; its K/V are those since the mirror's end alone.
    state.follow()
    for seed in range(5):
        step(state, seed)
        assert state.keeps_log == (seed < 4)
    update = state.export(9)
    assert update.plan == UpdatePlan("snapshot", 9, 14)
    assert update.tensors["k"][0].shape == (2, 5, 4)
    mirror.apply(update, WEIGHTS)
    assert_equal_states(mirror, state)


def test_a_log_with_a_gap_is_no_delta() -> None:
    """A pass that hands out no log: the rest may not be taken for the whole."""
    state = new_state()
    state.follow()
    state.stepped()
    read_all(state, 1, seed=1)
    assert not state.keeps_log
    assert state.plan(0).kind == "snapshot"


@pytest.mark.parametrize("heads", [1, 4])
def test_the_most_tokens_of_a_delta_are_where_a_snapshot_gets_smaller(heads: int) -> None:
    config = replace(SMALL, mamba_num_heads=heads, n_groups=1)
    most = most_delta_tokens(config)
    sizes = {
        (kind, count): sum(
            tensor.numel()
            for tensor in UpdatePlan(kind, 7, 7 + count).layout(config, torch.float32).values()
        )
        for kind in ("delta", "snapshot")
        for count in (most, most + 1)
    }
    assert sizes["delta", most] < sizes["snapshot", most]
    assert sizes["delta", most + 1] >= sizes["snapshot", most + 1]
    assert most_delta_tokens(replace(SMALL, layer_pattern="*-")) < 0


def test_an_update_holds_the_new_tokens_only() -> None:
    state = filled(5)
    state.advance(WEIGHTS, 5)
    update = state.export(3)
    assert (update.plan.start, update.plan.position) == (3, 5)
    assert [share.shape for share in update.tensors["k"]] == [(2, 2, 4)]
    assert_same_bits(update.tensors["v"][0], state.kv(0, 3, 5)[1])


@pytest.mark.parametrize("kind", ["snapshot", "delta", "kv"])
@pytest.mark.parametrize(("start", "position"), [(1, 5), (4, 5), (3, 13), (3, 2), (0, 3)])
def test_a_gap_or_an_overrun_is_refused(kind: UpdateKind, start: int, position: int) -> None:
    mirror, before = mirror_at_three()
    plan = UpdatePlan(kind, start, position)
    with pytest.raises(ValueError, match=rf"update: got tokens {start}..{position}, expected"):
        mirror.apply(update_of(plan), WEIGHTS)
    assert mirror.position == mirror.length == 3
    assert_same_bits(mirror.ssm, before)


def mirror_at_three() -> tuple[ContextState, Tensor]:
    """A mirror that has taken three tokens, and its SSM state."""
    state, mirror = filled(3), new_state()
    state.advance(WEIGHTS, 3)
    mirror.apply(state.export(0), WEIGHTS)
    return mirror, mirror.ssm.clone()


def update_of(plan: UpdatePlan) -> StateUpdate:
    """An update of ones with the shapes of a plan; no tokens where it ends before its start."""
    fitting = replace(plan, position=max(plan.start, plan.position))
    return StateUpdate(
        plan, {name: list(torch.ones(shape)) for name, shape in fitting.shapes(SMALL).items()}
    )


def test_a_delta_needs_the_snapshot_at_its_start() -> None:
    mirror, before = mirror_at_three()
    mirror.apply(update_of(UpdatePlan("kv", 3, 5)))
    with pytest.raises(ValueError, match=r"got a delta from token 5, .* which stands at 3"):
        mirror.apply(update_of(UpdatePlan("delta", 5, 6)), WEIGHTS)
    assert (mirror.position, mirror.length) == (3, 5)
    assert_same_bits(mirror.ssm, before)
    mirror.apply(update_of(UpdatePlan("snapshot", 5, 6)))
    assert (mirror.position, mirror.length) == (6, 6)


@pytest.mark.parametrize("wrong", ["missing", "too short", "a layer too many", "uneven"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("snapshot", name) for name in ("conv", "ssm", "k", "v")]
    + [("delta", name) for name in ("xbc", "dt", "k", "v")]
    + [("kv", "k"), ("kv", "v")],
)
def test_a_misshapen_update_changes_nothing(kind: UpdateKind, name: str, wrong: str) -> None:
    update, mirror = update_of(UpdatePlan(kind, 0, 5)), new_state()
    tensors = {name: list(shares) for name, shares in update.tensors.items()}
    share = tensors[name][0]
    if wrong == "missing":
        del tensors[name]
    elif wrong == "too short":
        tensors[name] = [share[..., :-1]]
    else:
        tensors[name] = [share, share if wrong == "a layer too many" else share[:1]]
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        mirror.apply(replace(update, tensors=tensors), WEIGHTS)
    assert mirror.position == mirror.length == 0
    assert not mirror.ssm.any()
    assert not mirror.conv.any()


def test_a_tensor_too_many_is_refused() -> None:
    update = update_of(UpdatePlan("kv", 0, 5))
    wrong = {**update.tensors, "ssm": list(torch.ones(1, 4, 4, 4))}
    with pytest.raises(ValueError, match="ssm: got a tensor, expected none in a kv"):
        new_state().apply(replace(update, tensors=wrong))


@pytest.mark.parametrize("pattern", ["M-", "*-", "-"])
def test_models_without_some_kind_of_layer(pattern: str) -> None:
    config = replace(SMALL, layer_pattern=pattern)
    state, mirror = new_state(config=config), new_state(config=config)
    log, weights = (log_of(2, 5), WEIGHTS) if "M" in pattern else (None, None)
    state.follow()
    state.append(log, 2)
    state.advance(weights, 2)
    update = state.export(0)
    mirror.apply(update, weights)
    assert mirror.position == mirror.length == 2
    assert set(update.tensors) == {"M": {"xbc", "dt"}, "*": {"k", "v"}, "-": set()}[pattern[0]]
    assert_same_bits(mirror.ssm, state.ssm)


def test_misuse_is_caught() -> None:
    state = filled(5)
    with pytest.raises(AssertionError, match="the log must be replayed"):
        state.append(log_of(1, 9), 1)
    with pytest.raises(AssertionError):
        state.advance(WEIGHTS, 6)
    with pytest.raises(AssertionError):
        new_state(capacity=3).append(log_of(4, 9), 4)


def test_a_released_state_writes_nowhere() -> None:
    """Its slot and pages may be another row's by now."""
    state = filled(5)
    state.release()
    state.release()
    with pytest.raises(AssertionError):
        state.write_kv(0, normal(2, 1, 4), normal(2, 1, 4))
    with pytest.raises(AssertionError):
        state.advance(WEIGHTS, 1)
