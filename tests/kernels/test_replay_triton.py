"""The replay's kernels against the recurrence in fp64, and the same bits however a log is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from tests.support.mamba_layer import (
    DEVICE,
    NAN,
    NEMOTRON,
    SLACK,
    TINY,
    Shape,
    before_softplus,
    fill_new_memory,
    recurrence,
    rows_of,
    steps_of_all_sizes,
    true_conv,
    true_softplus,
)
from twotower.kernels import replay as reference
from twotower.kernels import replay_triton as module
from twotower.kernels.replay import ReplayWeights
from twotower.kernels.replay_triton import replay

LIMITS = {torch.float32: 1e-6, torch.float16: 2e-4, torch.bfloat16: 5e-4}


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


@dataclass(frozen=True)
class Case:
    """Arguments of `replay`; a run works on copies of the states."""

    shape: Shape
    ssm_state: Tensor
    conv_state: Tensor
    xbc: Tensor
    dt: Tensor
    weights: ReplayWeights
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    counts: tuple[int, ...]

    def run(self, operator: Callable[..., None] = replay) -> tuple[Tensor, Tensor]:
        """ssm_state and conv_state afterwards."""
        states = self.ssm_state.clone(), self.conv_state.clone()
        counts = torch.tensor(self.counts, dtype=torch.int32, device=DEVICE)
        rows = rows_of(self.lengths, self.slots)
        operator(*states, self.xbc, self.dt, self.weights, rows, counts)
        return states

    def truth(self) -> tuple[Tensor, Tensor]:
        """The states afterwards, in fp64."""
        ssm_state, conv_state = self.ssm_state.double(), self.conv_state.clone()
        start = 0
        for length, slot, count in zip(self.lengths, self.slots, self.counts, strict=True):
            own = slice(start, start + count)
            start += length
            for layer in range(len(self.weights) if slot >= 0 and count else 0):
                history, xbc = conv_state[slot, layer].clone(), self.xbc[layer, own]
                bias = self.weights.conv_bias
                conv = true_conv(
                    history,
                    xbc,
                    self.weights.conv_weight[layer],
                    None if bias is None else bias[layer],
                )
                steps = true_softplus(
                    self.dt[layer, own].double() + self.weights.dt_bias[layer].double()
                )
                a_log = self.weights.a_log[layer].double()
                *_, (ssm_state[slot, layer], _) = recurrence(
                    self.shape, ssm_state[slot, layer], conv, steps, a_log
                )
                conv_state[slot, layer] = torch.cat((history, xbc))[-len(history) :]
        return ssm_state, conv_state

    def check(self, limit: float | None = None) -> None:
        """Moved slots are right, all others, NaN among them, keep their bits."""
        ssm_state, conv_state = self.run()
        true_ssm, true_conv_state = self.truth()
        moved = [
            slot for slot, count in zip(self.slots, self.counts, strict=True) if slot >= 0 and count
        ]
        kept = sorted({*range(len(ssm_state))} - {*moved})
        assert_same_bits(conv_state, true_conv_state, "conv_state")
        assert_same_bits(ssm_state[kept], self.ssm_state[kept], "slots without tokens")
        assert_relative_rms(
            ssm_state[moved], true_ssm[moved], SLACK * (limit or LIMITS[self.xbc.dtype])
        )


def make(
    lengths: Sequence[int],
    counts: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
    shape: Shape = TINY,
    dtype: torch.dtype = torch.float32,
    scale: float = 1e3,
    layers: int = 2,
    steps: Tensor | None = None,
) -> Case:
    """NaN in padding's tokens, in those beyond a row's count and in the slots of no row."""
    own = tuple(range(len(lengths))) if slots is None else tuple(slots)
    taken = tuple(lengths) if counts is None else tuple(counts)
    tokens, pool = sum(lengths), max(0, *own) + 2
    xbc = normal(layers, tokens, shape.channels, seed=1)
    if steps is None:
        dt = normal(layers, tokens, shape.heads, seed=2) - 2.0
    else:
        dt = before_softplus(steps)
    start = 0
    for length, count, slot in zip(lengths, taken, own, strict=True):
        unread = slice(start + (count if slot >= 0 else 0), start + length)
        xbc[:, unread] = dt[:, unread] = NAN
        start += length
    dt_bias = torch.zeros(layers, shape.heads)
    if steps is None:
        dt_bias = normal(layers, shape.heads, seed=3)
    ssm_state = normal(pool, layers, shape.heads, shape.width, shape.n, seed=4) * scale
    conv_state = normal(pool, layers, shape.taps - 1, shape.channels, seed=5)
    unused = sorted({*range(pool)} - {*own})
    ssm_state[unused] = conv_state[unused] = NAN
    weights = ReplayWeights(
        (normal(layers, shape.channels, shape.taps, seed=6) * 0.5).to(DEVICE, dtype),
        (normal(layers, shape.channels, seed=7) * 0.1).to(DEVICE, dtype),
        (normal(layers, shape.heads, seed=8) * 0.5).to(DEVICE),
        dt_bias.to(DEVICE),
        shape.groups,
    )
    return Case(
        shape,
        ssm_state.to(DEVICE),
        conv_state.to(DEVICE, dtype),
        xbc.to(DEVICE, dtype),
        dt.to(DEVICE, dtype),
        weights,
        tuple(lengths),
        own,
        taken,
    )


@pytest.mark.parametrize(
    ("lengths", "counts", "slots"),
    [
        ((1, 1, 1), (1, 0, 1), (2, 0, -1)),
        ((16, 3, 0, 16), (16, 2, 0, 5), (0, -1, -1, 2)),
        ((1, 40, 17), (1, 33, 17), (3, 1, 0)),
        ((70,), (65,), (1,)),
    ],
)
def test_values(lengths: tuple[int, ...], counts: tuple[int, ...], slots: tuple[int, ...]) -> None:
    make(lengths, counts, slots).check()


def test_from_an_empty_state() -> None:
    make((1, 20), scale=0.0).check()


def test_every_length() -> None:
    make(range(1, 65), shape=Shape(1, 3, 4, 1), layers=1).check()


def test_counts_below_the_length() -> None:
    make((64,) * 4, (0, 1, 31, 63), shape=Shape(1, 3, 4, 1), layers=1).check()


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_taps_and_counts_around_them(taps: int, count: int) -> None:
    make((5, 5), (count, 5 - count), shape=Shape(4, 5, 7, 2, taps)).check()


@pytest.mark.parametrize(
    "shape", [Shape(4, 5, 7, 2), Shape(2, 33, 20, 1), Shape(4, 3, 2, 4), Shape(3, 1, 1, 3)]
)
def test_shapes(shape: Shape) -> None:
    make((2, 5), shape=shape).check()


@pytest.mark.parametrize("count", [1, 20])
def test_fp16(count: int) -> None:
    make((count,), dtype=torch.float16, scale=1e5).check()


def test_bf16() -> None:
    """The interpreter cuts where a GPU rounds to bf16."""
    make((3, 2), dtype=torch.bfloat16, scale=1.0).check(2e-2)


def test_without_a_bias_and_with_channels_side_by_side() -> None:
    case = make((3, 6))
    tap_major = case.weights.conv_weight.transpose(1, 2).contiguous().transpose(1, 2)
    weights = replace(case.weights, conv_weight=tap_major, conv_bias=None)
    replace(case, weights=weights).check()


@pytest.mark.parametrize("count", [1, 64, 100])
def test_steps_of_all_sizes(count: int) -> None:
    make((count,), steps=steps_of_all_sizes(2, count, TINY.heads)).check(5e-6)


@pytest.mark.parametrize("step", [1e-4, 50.0])
def test_steps_of_one_size(step: float) -> None:
    make((64,), steps=torch.full((2, 64, TINY.heads), step).double()).check(5e-6)


def test_the_reference_agrees() -> None:
    case = make((16, 3, 9, 1), (16, 2, 0, 1), (0, -1, 2, 1))
    case = replace(case, xbc=case.xbc.nan_to_num(0.5), dt=case.dt.nan_to_num(0.5))
    (ssm_state, conv_state), want = case.run(), case.run(reference.replay)
    assert_relative_rms(ssm_state[:3], want[0][:3], SLACK * 1e-6)
    assert_same_bits(conv_state, want[1])


def test_rows_alone_and_in_a_batch() -> None:
    lengths, counts = (3, 16, 2, 33, 1), (3, 11, 0, 33, 1)
    case = make(lengths, counts)
    ssm_state, conv_state = case.run()
    start = 0
    for slot, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        own = slice(start, start + count)
        start += length
        alone = replace(
            case,
            xbc=case.xbc[:, own],
            dt=case.dt[:, own],
            lengths=(count,),
            slots=(slot,),
            counts=(count,),
        ).run()
        assert_same_bits(ssm_state[slot], alone[0][slot], f"row {slot}")
        assert_same_bits(conv_state[slot], alone[1][slot], f"row {slot}")


@pytest.mark.parametrize("cut", [0, 1, 2, 3, 12, 16, 17, 20])
def test_a_log_may_be_cut_anywhere(cut: int) -> None:
    whole = make((20,))
    first = replace(whole, counts=(cut,))
    ssm_state, conv_state = first.run()
    rest = replace(
        whole,
        ssm_state=ssm_state,
        conv_state=conv_state,
        xbc=whole.xbc[:, cut:],
        dt=whole.dt[:, cut:],
        lengths=(20 - cut,),
        counts=(20 - cut,),
    )
    for got, want in zip(rest.run(), whole.run(), strict=True):
        assert_same_bits(got, want)


def test_views_of_pools_and_logs() -> None:
    case = make((5, 2))
    heads, layers = TINY.heads, 2
    log = torch.full((7, layers, TINY.channels + heads + 9), NAN, device=DEVICE)
    log[..., 3 : 3 + TINY.channels] = case.xbc.transpose(0, 1)
    log[..., -heads - 2 : -2] = case.dt.transpose(0, 1)
    pools = [
        torch.full((len(state), 7, *state.shape[2:]), NAN, device=DEVICE)
        for state in (case.ssm_state, case.conv_state)
    ]
    for pool, state in zip(pools, (case.ssm_state, case.conv_state), strict=True):
        pool[:, 2:6:2] = state
    counts = torch.tensor(case.counts, dtype=torch.int32, device=DEVICE)
    log_before = log.clone()
    replay(
        pools[0][:, 2:6:2],
        pools[1][:, 2:6:2],
        log[..., 3 : 3 + TINY.channels].transpose(0, 1),
        log[..., -heads - 2 : -2].transpose(0, 1),
        case.weights,
        rows_of(case.lengths, case.slots),
        counts,
    )
    for pool, want in zip(pools, case.run(), strict=True):
        assert_same_bits(pool[:, 2:6:2], want)
        assert bool(pool[:, [0, 1, 3, 5, 6]].isnan().all())
    assert_same_bits(log, log_before)


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (4,)])
def test_padding_alone(lengths: tuple[int, ...]) -> None:
    case = make((*lengths,), lengths, (-1,) * len(lengths))
    case = replace(case, xbc=case.xbc.nan_to_num(0.5), dt=case.dt.nan_to_num(0.5))
    states = normal(*case.ssm_state.shape).to(DEVICE), normal(*case.conv_state.shape).to(DEVICE)
    case = replace(case, ssm_state=states[0], conv_state=states[1])
    for got, before in zip(case.run(), states, strict=True):
        assert_same_bits(got, before)


@pytest.mark.parametrize("limit", [1, 3 * 1000, 1 << 30])
def test_more_layers_than_the_scratch_holds_follow_one_another(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make((5, 3), (5, 2), layers=5)
    want = case.run()
    monkeypatch.setattr(module, "SCRATCH_BYTES", limit)
    for got, own in zip(case.run(), want, strict=True):
        assert_same_bits(got, own)


MULTIPLES = (
    "ssm_state_stride_s ssm_state_stride_m ssm_state_stride_h ssm_state_stride_p "
    "conv_state_stride_s conv_state_stride_m conv_state_stride_k xbc_stride_m xbc_stride_t "
    "a_log_stride_m heads conv_channels all_channels moved_channels"
)
LAUNCH = Launch(
    "twotower.kernels.replay_triton:_replay_kernel",
    {
        **dict.fromkeys(MULTIPLES.split(), "i32:16"),
        **dict.fromkeys(["ssm_state", "steps", "a_log"], "*fp32"),
        **dict.fromkeys(["conv_state", "xbc", "conv"], "*bf16"),
        **dict.fromkeys(["cu_seqlens", "slots", "counts"], "*i32:1"),
        **dict.fromkeys(["total_tokens", "per_group"], "i32"),
    },
    {
        "head_dim": NEMOTRON.width,
        "state_dim": NEMOTRON.n,
        "kept": NEMOTRON.taps - 1,
        "block_p": module.SLICE.channels,
        "block_n": NEMOTRON.n,
        "block_k": 4,
        "block_c": 64,
    },
)


def test_it_compiles_for_a_gpu() -> None:
    (compiled,) = compile_all([LAUNCH])
    assert compiled.spills == 0
    assert compiled.registers <= 80, "six programs fit side by side"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("lengths", "counts"),
    [((1,) * 8, (1,) * 8), ((16,) * 6, (16, 5, 0, 1, 16, 9)), ((200,), (130,))],
)
def test_layers_of_the_large_model(lengths: tuple[int, ...], counts: tuple[int, ...]) -> None:
    case = make(lengths, counts, shape=NEMOTRON, dtype=torch.bfloat16, layers=3)
    case.check()
    for got, again in zip(case.run(), case.run(), strict=True):
        assert_same_bits(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("cut", [1, 8, 15])
def test_a_log_of_the_large_model_may_be_cut_anywhere(cut: int) -> None:
    whole = make((16,) * 4, shape=NEMOTRON, dtype=torch.bfloat16, layers=3)
    rest = [part.unflatten(1, (4, 16))[:, :, cut:].flatten(1, 2) for part in (whole.xbc, whole.dt)]
    ssm_state, conv_state = replace(whole, counts=(cut,) * 4).run()
    second = replace(
        whole,
        ssm_state=ssm_state,
        conv_state=conv_state,
        xbc=rest[0],
        dt=rest[1],
        lengths=(16 - cut,) * 4,
        counts=(16 - cut,) * 4,
    )
    for got, want in zip(second.run(), whole.run(), strict=True):
        assert_same_bits(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 16])
def test_a_graph_replays_it(length: int) -> None:
    case = make((length,) * 3, shape=NEMOTRON, dtype=torch.bfloat16, layers=3)
    case.run()
    states = case.ssm_state.clone(), case.conv_state.clone()
    counts = torch.tensor(case.counts, dtype=torch.int32, device=DEVICE)
    rows = rows_of(case.lengths, case.slots)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replay(*states, case.xbc, case.dt, case.weights, rows, counts)
    for state, before in zip(states, (case.ssm_state, case.conv_state), strict=True):
        state.copy_(before)
    graph.replay()
    for got, want in zip(states, case.run(), strict=True):
        assert_same_bits(got, want)
