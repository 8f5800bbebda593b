"""A row's context state: log, snapshot and updates to a mirror."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.comparing import assert_same_bits, normal
from tests.random_model import SMALL
from twotower.kernels.replay import ReplayWeights, replay
from twotower.towers.state import ContextState, LayerLog, StateUpdate

WEIGHTS = ReplayWeights(
    normal(SMALL.conv_dim, 4, seed=1), None, normal(4, seed=2), normal(4, seed=3), SMALL.n_groups
)


def new_state(capacity: int = 12) -> ContextState:
    return ContextState(SMALL, capacity, torch.device("cpu"), torch.float32)


def filled(tokens: int, seed: int = 5, capacity: int = 12) -> ContextState:
    """A state with a log of some tokens and their K/V."""
    state = new_state(capacity)
    state.append([log_of(tokens, seed)], tokens)
    state.k[:, :, :tokens] = normal(1, 2, tokens, 4, seed=seed + 2)
    state.v[:, :, :tokens] = normal(1, 2, tokens, 4, seed=seed + 3)
    return state


def log_of(tokens: int, seed: int) -> LayerLog:
    return LayerLog(normal(tokens, SMALL.conv_dim, seed=seed), normal(tokens, 4, seed=seed + 1))


def test_an_empty_state() -> None:
    state = new_state()
    assert state.position == state.length == 0
    assert state.conv.shape == (1, 3, 32)
    assert state.ssm.shape == (1, 4, 4, 4)
    assert state.k.shape == state.v.shape == (1, 2, 12, 4)
    assert not state.conv.any()
    assert not state.ssm.any()
    assert state.num_bytes == 4 * (3 * 32 + 4 * 4 * 4 + 2 * 2 * 12 * 4)


def test_the_states_stay_fp32_in_a_bf16_model() -> None:
    state = ContextState(SMALL, 3, torch.device("cpu"), torch.bfloat16)
    assert state.ssm.dtype == torch.float32
    assert state.conv.dtype == state.k.dtype == torch.bfloat16


def test_a_log_counts_until_it_is_replayed() -> None:
    state = filled(5)
    empty = new_state().num_bytes
    assert (state.position, state.length) == (0, 5)
    assert state.num_bytes == empty + 4 * 5 * (32 + 4)
    state.advance([WEIGHTS], 2)
    assert (state.position, state.length) == (2, 5)
    state.advance([WEIGHTS], 0)
    state.advance([WEIGHTS], 3)
    assert (state.position, state.length) == (5, 5)
    # What was replayed last is kept until it has been sent.
    assert state.num_bytes == empty + 4 * 3 * (32 + 4)
    state.export(2)
    assert state.num_bytes == empty


@pytest.mark.parametrize("cut", range(6))
def test_advancing_is_the_replay_of_the_log_however_it_is_cut(cut: int) -> None:
    state, log = filled(5), log_of(5, 5)
    ssm, conv = torch.zeros(4, 4, 4), torch.zeros(3, 32)
    replay(ssm, conv, log.xbc, log.dt, WEIGHTS)
    state.advance([WEIGHTS], cut)
    state.advance([WEIGHTS], 5 - cut)
    assert_same_bits(state.ssm[0], ssm)
    assert_same_bits(state.conv[0], conv)


def test_a_mirror_follows_update_by_update() -> None:
    state, mirror = filled(5), new_state()
    state.advance([WEIGHTS], 3)
    mirror.apply(state.export(0), [WEIGHTS])
    assert (mirror.position, mirror.length) == (3, 3)
    state.advance([WEIGHTS], 2)
    mirror.apply(state.export(3), [WEIGHTS])
    assert mirror.position == 5
    assert_same_bits(mirror.ssm, state.ssm)
    assert_same_bits(mirror.conv, state.conv)
    assert_same_bits(mirror.k[:, :, :5], state.k[:, :, :5])
    assert_same_bits(mirror.v[:, :, :5], state.v[:, :, :5])
    # A copy: what happens to the one later leaves the other alone.
    state.ssm.zero_()
    assert bool(mirror.ssm.any())


def test_a_delta_is_sent_where_it_is_the_smaller_one() -> None:
    state, mirror = filled(1), new_state()
    state.advance([WEIGHTS], 1)
    update = state.export(0)
    assert update.is_delta
    assert set(update.tensors) == {"xbc", "dt", "k", "v"}
    assert update.tensors["xbc"].shape[1] == 1
    snapshot = sum(tensor.nbytes for tensor in (state.conv, state.ssm))
    assert update.num_bytes < snapshot
    with pytest.raises(ValueError, match="got a delta, expected a snapshot"):
        mirror.apply(update)
    assert not bool(mirror.ssm.any())
    mirror.apply(update, [WEIGHTS])
    assert_same_bits(mirror.ssm, state.ssm)
    assert_same_bits(mirror.conv, state.conv)
    # What was handed out once is not kept: the next mirror starts from a snapshot.
    assert not state.export(0).is_delta


def test_a_delta_that_does_not_begin_at_the_mirror_is_not_made() -> None:
    state = filled(3)
    state.advance([WEIGHTS], 2)
    state.advance([WEIGHTS], 1)
    assert not state.export(0).is_delta
    assert set(state.export(0).tensors) == {"conv", "ssm", "k", "v"}


def test_an_update_holds_the_new_tokens_only() -> None:
    state = filled(5)
    state.advance([WEIGHTS], 5)
    update = state.export(3)
    assert (update.start, update.position) == (3, 5)
    assert update.tensors["k"].shape == (1, 2, 2, 4)
    assert_same_bits(update.tensors["v"], state.v[:, :, 3:5])


@pytest.mark.parametrize(("start", "position"), [(1, 5), (4, 5), (3, 13), (3, 2), (0, 3)])
def test_a_gap_or_an_overrun_is_refused(start: int, position: int) -> None:
    state = filled(5)
    state.advance([WEIGHTS], 5)
    mirror = new_state()
    mirror.apply(StateUpdate(0, 3, tensors_of(state, 0, 3)))
    before = mirror.ssm.clone()
    count = max(0, position - start)
    update = StateUpdate(start, position, tensors_of(state, 0, count))
    with pytest.raises(ValueError, match=rf"update: got tokens {start}..{position}, expected"):
        mirror.apply(update)
    assert mirror.position == 3
    assert_same_bits(mirror.ssm, before)


def tensors_of(state: ContextState, start: int, stop: int) -> dict[str, torch.Tensor]:
    span = slice(start, stop)
    return {
        "conv": state.conv,
        "ssm": state.ssm,
        "k": state.k[:, :, span],
        "v": state.v[:, :, span],
    }


@pytest.mark.parametrize("name", ["conv", "ssm", "k", "v"])
@pytest.mark.parametrize("missing", [False, True])
def test_a_misshapen_update_changes_nothing(name: str, missing: bool) -> None:
    state, mirror = filled(5), new_state()
    state.advance([WEIGHTS], 5)
    update = state.export(0)
    wrong = dict(update.tensors)
    if missing:
        del wrong[name]
    else:
        wrong[name] = wrong[name][..., :-1]
    with pytest.raises(ValueError, match=rf"^{name}: got "):
        mirror.apply(replace(update, tensors=wrong))
    assert mirror.position == 0
    assert not mirror.ssm.any()
    assert not mirror.conv.any()


def test_misuse_is_caught() -> None:
    state = filled(5)
    with pytest.raises(AssertionError, match="the log must be replayed"):
        state.append([log_of(1, 9)], 1)
    with pytest.raises(AssertionError):
        state.advance([WEIGHTS], 6)
    with pytest.raises(AssertionError):
        new_state(capacity=3).append([log_of(4, 9)], 4)
