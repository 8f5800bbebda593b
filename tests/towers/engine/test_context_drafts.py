"""Drafts of many lengths in one pass: the bits, states and logs that each row gets alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.random_model import small_config, write_checkpoint
from twotower.kernels.dispatch import force
from twotower.towers.checkpoint.weights import load_context_tower
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.engine import context_drafts
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import GRAPH_TOKENS, MAX_LENGTH, ROW_BUCKETS
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextResult, ContextWork
from twotower.towers.engine.cuda_graph import CapturedGraph, GraphMemory
from twotower.towers.errors import NumericalError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState

CAPACITY = 100
# Tokens that are read, and how many of them behind the first are right; 1 token is a step.
SHAPES = ((1, 0), (2, 0), (2, 1), (5, 2), (1, 0), (8, 7), (16, 9), (3, 2))
LONG = (*SHAPES, (40, 21), (MAX_LENGTH, 63))
HOT = Sampler(1.0, None, None, None, key=77)


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> ContextTower:
    folder = tmp_path_factory.mktemp("small")
    return load_context_tower(write_checkpoint(folder, small_config(layer_pattern="M*E-M*")))


def device_pass(tower: ContextTower) -> ContextPass:
    memory, log = GraphMemory(tower.device), BlockLog(tower)
    return ContextPass(
        tower,
        ContextSteps(tower, memory),
        ContextBlocks(tower, memory, log),
        ContextDrafts(tower, memory, log),
    )


def prompt_of(row: int) -> list[int]:
    return [4 + (5 * row + 3 * place) % 19 for place in range(2 + 7 * row % 23)]


def opened(tower: ContextTower, count: int) -> list[ContextState]:
    """Rows that have read their prompts, each alone, and whose mirrors follow."""
    states = tower.new_states(count, CAPACITY)
    for row, state in enumerate(states):
        ContextPass(tower).run([ContextWork(state, prompt_of(row), prefill=True)])
        state.follow()
    return states


def work_of(state: ContextState, tokens: Sequence[int]) -> ContextWork:
    step = len(tokens) == 1
    first = state.position + 1
    draw = Draw(HOT, range(first, first + len(tokens)))
    return ContextWork(state, tokens, advance=step, draw=draw, accepts=not step)


@pytest.fixture(scope="module")
def drafts(tower: ContextTower) -> list[list[int]]:
    """Drafts of the rows of LONG, right as far as LONG says."""
    found = []
    for state, (length, right) in zip(opened(tower, len(LONG)), LONG, strict=True):
        tokens = [5]
        for _ in range(right):
            tokens.append(drawn(ContextPass(tower).run([work_of(state, tokens[-1:])])[0])[0])
        if len(tokens) < length:
            (token,) = drawn(ContextPass(tower).run([work_of(state, tokens[-1:])])[0])
            tokens.append(4 if token != 4 else 6)
        found.append(tokens + [4] * (length - len(tokens)))
    return found


def drawn(result: Any) -> list[int]:
    assert isinstance(result, ContextResult), result
    assert result.drawn is not None
    return result.drawn.token_ids


def assert_same(got: ContextState, want: ContextState) -> None:
    assert (got.position, got.length) == (want.position, want.length)
    assert torch.equal(got.ssm, want.ssm)
    assert torch.equal(got.conv, want.conv)
    for ours, theirs in zip(
        got.kv_layers(0, got.length), want.kv_layers(0, want.length), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shapes", [SHAPES, LONG], ids=["to 16", "to 64"])
def test_each_row_gets_what_it_gets_alone(
    tower: ContextTower, drafts: list[list[int]], shapes: Sequence[tuple[int, int]]
) -> None:
    count = len(shapes)
    alone, together = opened(tower, count), opened(tower, count)
    starts = [state.position for state in alone]
    want: list[Any] = []
    for state, tokens in zip(alone, drafts, strict=False):
        want += ContextPass(tower).run([work_of(state, tokens)])
    works = [work_of(state, tokens) for state, tokens in zip(together, drafts, strict=False)]
    got: list[Any] = device_pass(tower).run(works)
    for row, (length, right) in enumerate(shapes):
        assert got[row].drawn == want[row].drawn
        assert torch.equal(got[row].hidden, want[row].hidden)
        assert got[row].accepted == want[row].accepted == right, (row, length)
        assert together[row].position == starts[row] + 1 + right
        assert_same(together[row], alone[row])
        updates = [states[row].export(starts[row]) for states in (together, alone)]
        assert updates[0].plan == updates[1].plan
        # A snapshot is smaller than the log of many tokens.
        assert updates[0].plan.kind == "delta" or right > 6
        for name, layers in updates[1].tensors.items():
            for ours, theirs in zip(updates[0].tensors[name], layers, strict=True):
                assert torch.equal(ours, theirs), name


def test_rows_go_on_after_a_draft(tower: ContextTower, drafts: list[list[int]]) -> None:
    """What is behind the accepted tokens is overwritten by the next pass."""
    alone, together = opened(tower, 4), opened(tower, 4)
    run = device_pass(tower).run
    for offset in range(3):
        tokens = [drafts[(row + offset) % 8] for row in range(4)]
        run([work_of(state, own) for state, own in zip(together, tokens, strict=True)])
        for state, own in zip(alone, tokens, strict=True):
            ContextPass(tower).run([work_of(state, own)])
    for got, want in zip(together, alone, strict=True):
        assert_same(got, want)


def test_nothing_is_written_behind_a_draft(tower: ContextTower) -> None:
    """A row whose pages end with its draft, beside longer ones and padding."""
    states = tower.new_states(3, 2 * 64)
    short = states[1]
    ContextPass(tower).run([ContextWork(short, [5] * 126, prefill=True)])
    pool = short.pool
    written = torch.zeros(pool.k.shape[2], dtype=torch.bool)
    lengths = (16, 2, 9)
    for state, length in zip(states, lengths, strict=True):
        for span in pool.runs(state.pages, state.length, state.length + length):
            written[span] = True
    for held in (pool.k, pool.v):
        held[:, :, ~written] = 0.5
    works = [work_of(state, [5] * length) for state, length in zip(states, lengths, strict=True)]
    assert all(isinstance(result, ContextResult) for result in device_pass(tower).run(works))
    for held in (pool.k, pool.v):
        assert bool((held[:, :, ~written] == 0.5).all())
        assert not bool((held[:, :, written] == 0.5).all(-1).any())


def test_logits_that_are_not_finite_fail_their_row_alone(tower: ContextTower) -> None:
    embedding = tower.weights.embedding.clone()
    embedding[9] = float("nan")
    broken = ContextTower(tower.config, replace(tower.weights, embedding=embedding))
    want = drawn(ContextPass(tower).run([work_of(tower.new_state(CAPACITY), [5, 6, 7])])[0])
    states = broken.new_states(2, CAPACITY)
    works = [work_of(states[0], [5, 6, 7]), work_of(states[1], [5, 9])]
    good, failed = device_pass(broken).run(works)
    assert isinstance(failed, NumericalError)
    assert drawn(good) == want


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the programs whose graphs are run."""
    names: list[str] = []
    call = CapturedGraph.__call__

    def counted(graph: CapturedGraph) -> None:
        names.append(graph._work.__self__.__class__.__module__.rsplit(".", 1)[1])  # type: ignore
        call(graph)

    monkeypatch.setattr(CapturedGraph, "__call__", counted)
    return names


def test_a_pass_with_drafts_is_one_program(tower: ContextTower, launched: list[str]) -> None:
    states, run = opened(tower, 16), device_pass(tower).run
    lengths = (1, 2, 4, 8, 16, 3, 1, 5, 7, 11, 13, 1, 2, 16, 9, 6)
    run([work_of(state, [5] * length) for state, length in zip(states, lengths, strict=True)])
    assert launched == ["context_drafts"]
    launched.clear()
    run([work_of(state, [5]) for state in states])
    assert launched == ["context_steps"]
    launched.clear()
    run([work_of(states[0], [5, 6]), ContextWork(states[1], [5] * 8), work_of(states[2], [5])])
    assert sorted(launched) == ["context_blocks", "context_drafts"]


def test_drafts_beside_a_prompt_join_its_pass(tower: ContextTower, launched: list[str]) -> None:
    states = opened(tower, 2)
    works = [work_of(states[0], [5, 6]), ContextWork(states[1], [5] * 20, prefill=True)]
    device_pass(tower).run(works)
    assert launched == []


@pytest.mark.parametrize(("rows", "programs"), [(1, 2), (16, 12), (64, 24), (300, 30)])
def test_warming_up_makes_what_drafts_of_16_need(
    tower: ContextTower, monkeypatch: pytest.MonkeyPatch, rows: int, programs: int
) -> None:
    made: list[tuple[int, ...]] = []

    def noted(_: Any, *shape: Any) -> None:
        made.append(shape)

    own = ContextDrafts(tower, GraphMemory(tower.device), BlockLog(tower))
    program = SimpleNamespace(capture=lambda: None)
    monkeypatch.setattr(own, "_program", lambda *shape: noted(*shape) or program)
    own.warm_up(tower.new_state(8).pool, rows)
    assert len(made) == len(set(made)) == programs
    for count in range(1, min(rows, ROW_BUCKETS[-1]) + 1):
        for tokens in range(count, 16 * count + 1):
            assert (*context_drafts._shape_for(count, tokens), 16) in made


def test_large_passes_are_cut_into_programs() -> None:
    lengths = [1] * 130 + [16] * 100 + [MAX_LENGTH] * 40
    works: Any = [SimpleNamespace(tokens=[0] * length) for length in lengths]
    parts = list(context_drafts._parts(works))
    assert [work for part in parts for work in part] == works
    for part in parts:
        tokens = sum(len(work.tokens) for work in part)
        bucket, mean = context_drafts._shape_for(len(part), tokens)
        assert len(part) <= bucket
        assert tokens <= bucket * mean <= GRAPH_TOKENS
    assert len(parts) <= 5


# Outputs of padding are whatever memory held.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
def test_with_the_kernels_instead_of_the_references(
    tower: ContextTower, drafts: list[list[int]], tmp_path: Path
) -> None:
    """Under their interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = write_checkpoint(tmp_path, small_config(layer_pattern="M*E-M*"))
    own = load_context_tower(folder, device, for_triton=True)
    rows = (0, 2, 3, 7)
    want_states, states = (
        [state for row, state in enumerate(opened(one, 8)) if row in rows] for one in (tower, own)
    )
    want: list[Any] = []
    for state, row in zip(want_states, rows, strict=True):
        want += ContextPass(tower).run([work_of(state, drafts[row])])
    works = [work_of(state, drafts[row]) for state, row in zip(states, rows, strict=True)]
    with force("triton"):
        got: list[Any] = device_pass(own).run(works)
    for index, (state, other) in enumerate(zip(states, want_states, strict=True)):
        assert drawn(got[index]) == drawn(want[index])
        assert got[index].accepted == want[index].accepted
        assert state.position == state.length == other.position
        torch.testing.assert_close(state.ssm.cpu(), other.ssm, atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(
            state.kv_layers(0, state.length), other.kv_layers(0, other.length), strict=True
        ):
            torch.testing.assert_close(ours.cpu(), theirs, atol=1e-4, rtol=1e-4)
