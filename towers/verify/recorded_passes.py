"""The passes of a device's self-test, with the tiny model's towers (`formula_model`).

Each kind of pass that a tower makes is here once, through the programs of its engine, and leads on
from the last one. What they compute a `Record` writes down or compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from twotower.towers.decoding.sampling import DOMAIN_AUTOREGRESSIVE, DOMAIN_DENOISE, Draw, Sampler
from twotower.towers.decoding.unmasking import ThresholdRule
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_packed import ContextPacked
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextResult, ContextWork
from twotower.towers.engine.cuda_graph import GraphMemory
from twotower.towers.engine.denoiser_steps import DenoiserSteps
from twotower.towers.engine.device_drafts import DeviceDraft, StepResult
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool
from twotower.towers.state.update import StateUpdate, UpdatePlan
from twotower.towers.verify.formula_model import FORMULA_CONFIG, whole_numbers

BLOCK = 16
# Longer than a chunk of the scan and a page of K/V, and shorter than a page.
_PROMPTS = (70, 9)
_CAPACITY = 192
# Tokens of a row over whose pages attention is split.
_LONG = 600
# Without special tokens, and those of which rounding decides the experts in either tower.
_NEAR_TIES = (7, 9, 18, 22, 26, 33, 36, 81, 85, 95)
_USABLE = [token for token in range(4, FORMULA_CONFIG.vocab_size) if token not in _NEAR_TIES]
# So hot that noise decides, and not the last bits of logits; what these are shows in log-probs.
_HOT = Sampler(64.0, None, None, None, key=12)


class Record(Protocol):
    """Takes what the passes compute, to write it down or to compare it."""

    def near(self, name: str, got: Tensor) -> None:
        """Takes floats."""

    def same(self, name: str, got: Sequence[int]) -> None:
        """Takes whole numbers."""


def run_passes(context: ContextTower, denoiser: DenoiserTower, record: Record) -> None:
    """All passes of the self-test with the tiny model's towers, through the engines' programs."""
    pool = StatePool(
        FORMULA_CONFIG,
        len(_PROMPTS) + 1,
        len(_PROMPTS) * pages_for(_CAPACITY) + pages_for(_LONG + BLOCK),
        context.device,
        context.dtype,
    )
    states = [pool.open(_CAPACITY) for _ in _PROMPTS]
    memory, log = GraphMemory(context.device), BlockLog(context)
    steps, blocks = ContextSteps(context, memory), ContextBlocks(context, memory, log)
    drafts, packed = ContextDrafts(context, memory, log), ContextPacked(context, memory, log)
    # As graphs on a GPU, which a program becomes only when it has come often.
    steps.warm_up(pool, len(_PROMPTS))
    blocks.warm_up(pool, BLOCK, len(_PROMPTS))
    packed.warm_up(pool, sum(_PROMPTS), sum(_PROMPTS))
    programs = ContextPass(context, steps, blocks, drafts, packed)
    with torch.inference_mode():
        _prefill(programs, states, record)
        _extend(programs, states, record)
        _step(programs, states, record)
        _check_draft(programs, states, record)
        _state(states, record)
        _mirror(context, states, record)
        _denoise(denoiser, states, record)
        _fill(denoiser, states, record)
        _read_long(programs, denoiser, pool, record)


def _tokens(count: int, salt: int) -> list[int]:
    """Token ids that do not repeat soon."""
    return [_USABLE[(salt + 37 * place + place * place) % len(_USABLE)] for place in range(count)]


def _prefill(programs: ContextPass, states: Sequence[ContextState], record: Record) -> None:
    """Pieces of two prompts in one pass."""
    works = [
        ContextWork(state, _tokens(length, 5 * row), prefill=True, logits=True)
        for row, (state, length) in enumerate(zip(states, _PROMPTS, strict=True))
    ]
    for row, result in enumerate(_results(programs, works)):
        assert result.logits is not None
        record.near(f"prefill/logits/{row}", result.logits)
        record.near(f"prefill/hidden/{row}", result.hidden)
    _state(states, record, "prefill")


def _extend(programs: ContextPass, states: Sequence[ContextState], record: Record) -> None:
    """Committed blocks, and the token after each."""
    works = [
        ContextWork(state, _tokens(BLOCK, 40 + row), draw=_draw(state, BLOCK))
        for row, state in enumerate(states)
    ]
    _take(programs, works, record, "extend")


def _step(programs: ContextPass, states: Sequence[ContextState], record: Record) -> None:
    """Single tokens, each with the draw of the next."""
    works = [
        ContextWork(state, _tokens(1, 60 + row), draw=_draw(state, 1))
        for row, state in enumerate(states)
    ]
    _take(programs, works, record, "step")


def _check_draft(programs: ContextPass, states: Sequence[ContextState], record: Record) -> None:
    """A draft, of which the tower draws none itself behind its first token."""
    state, draft = states[0], _tokens(4, 80)
    places = range(state.position + 1, state.position + 1 + len(draft))
    draw = Draw(_HOT, list(places), 0, DOMAIN_AUTOREGRESSIVE)
    (result,) = _results(programs, [ContextWork(state, draft, draw=draw, accepts=True)])
    assert result.drawn is not None
    record.same("draft/tokens", [result.accepted, *result.drawn.token_ids])
    record.near("draft/log_probs", torch.tensor(result.drawn.log_probs))


def _draw(state: ContextState, count: int) -> Draw:
    return Draw(_HOT, [state.position + count], 0, DOMAIN_AUTOREGRESSIVE)


def _take(programs: ContextPass, works: Sequence[ContextWork], record: Record, name: str) -> None:
    """Runs works that draw one token each."""
    for row, result in enumerate(_results(programs, works)):
        assert result.drawn is not None
        record.near(f"{name}/hidden/{row}", result.hidden)
        record.same(f"{name}/token/{row}", result.drawn.token_ids)
        record.near(f"{name}/log_probs/{row}", torch.tensor(result.drawn.log_probs))


def _results(programs: ContextPass, works: Sequence[ContextWork]) -> list[ContextResult]:
    """The results of works; raises the error of a work."""
    results = []
    for result in programs.run(works):
        if isinstance(result, BaseException):
            raise result
        results.append(result)
    return results


def _state(states: Sequence[ContextState], record: Record, name: str = "state") -> None:
    """What Mamba layers remember and attention layers keep."""
    for row, state in enumerate(states):
        k, v = state.kv_layers(0, state.position)
        record.near(f"{name}/conv/{row}", state.conv)
        record.near(f"{name}/ssm/{row}", state.ssm)
        record.near(f"{name}/k/{row}", k)
        record.near(f"{name}/v/{row}", v)


def _mirror(context: ContextTower, states: Sequence[ContextState], record: Record) -> None:
    """A mirror that gets a row's snapshot, and then replays a delta of the tokens that follow."""
    state, pool = states[0], states[0].pool
    assert isinstance(pool, StatePool)
    mirror = pool.open(_CAPACITY)
    mirror.apply(state.export(0))
    state.follow()
    context.forward([_tokens(3, 70)], [state])
    context.advance(state, 3)
    delta = state.export(mirror.position)
    assert delta.plan.kind == "delta"
    mirror.apply(delta, context.replay_weights)
    _state([mirror], record, "mirror")
    pool.close(mirror)


def _denoise(denoiser: DenoiserTower, states: Sequence[ContextState], record: Record) -> None:
    """A pass over blocks at two timesteps, and a plain one over single tokens."""
    mask = FORMULA_CONFIG.mask_token_id
    blocks = [[mask] * BLOCK, [*_tokens(9, 30), *[mask] * (BLOCK - 9)]]
    hidden = denoiser.forward(blocks, [1.0, 7 / BLOCK], states)
    record.near("denoise/hidden", hidden)
    record.near("denoise/logits", denoiser.logits(hidden))
    plain = denoiser.forward([_tokens(1, 50), _tokens(1, 51)], [None, None], states)
    record.near("denoise/plain", plain)


def _read_long(
    programs: ContextPass, denoiser: DenoiserTower, pool: StatePool, record: Record
) -> None:
    """A step and a block behind many pages, whose state is a formula."""
    state = pool.open(_LONG + BLOCK)
    plan = UpdatePlan("snapshot", 0, _LONG)
    tensors = {}
    for name, layout in plan.layout(FORMULA_CONFIG, denoiser.dtype).items():
        # Large values: the mean of so many has to count beside what the layer is added to.
        values = whole_numbers(name, tuple(layout.shape)) * (4 if name == "v" else 1 / 8)
        tensors[name] = values.to(denoiser.device, layout.dtype)
    state.apply(StateUpdate(plan, {name: list(tensor) for name, tensor in tensors.items()}))
    _take(programs, [ContextWork(state, _tokens(1, 90), draw=_draw(state, 1))], record, "long step")
    hidden = denoiser.forward([_tokens(BLOCK, 10)], [0.5], [state])
    record.near("long block/hidden", hidden)
    pool.close(state)


def _fill(denoiser: DenoiserTower, states: Sequence[ContextState], record: Record) -> None:
    """Blocks from masks to tokens, with draws and commits on the device."""
    steps = DenoiserSteps(denoiser)
    steps.warm_up(states[0].pool, BLOCK, len(states))
    rules = ThresholdRule(0.9, 2, "leftmost"), ThresholdRule(0.5, 2, "released")
    known: Sequence[Sequence[int]] = ((), _tokens(5, 20))
    drafts = [
        DeviceDraft(BLOCK, state.position, given, rule, _HOT, DOMAIN_DENOISE, fixed_step=False)
        for state, rule, given in zip(states, rules, known, strict=True)
    ]
    works = list(zip(states, drafts, strict=True))
    for step in range(max(rule.steps_per_block for rule in rules)):
        busy = [row for row, (_, draft) in enumerate(works) if draft.remaining]
        results = steps.run([works[row] for row in busy])
        for row, result in zip(busy, results, strict=True):
            if not isinstance(result, StepResult):
                raise result
            record.same(f"fill {step}/tokens/{row}", result.token_ids)
            record.same(f"fill {step}/commit_steps/{row}", result.commit_steps)
            record.near(f"fill {step}/log_probs/{row}", torch.tensor(result.log_probs))
