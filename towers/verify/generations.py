"""Replay of whole generations: tokens, denoiser calls, and the decisions of every recorded call."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.unmask import SamplingBatch, gumbel, tempered, without
from twotower.towers.decoding.generation import committed, generate_blocks
from twotower.towers.decoding.sampling import Draw, Sampler, sampling_batch
from twotower.towers.decoding.unmasking import BlockDraft, ThresholdRule
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.modes import TRAITS, Mode
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState
from twotower.towers.verify.report import (
    LOGIT_TOLERANCE,
    STATE_TOLERANCE,
    Case,
    CaseReport,
    Recorded,
)
from twotower.towers.verify.single_passes import read_tokens


def replay_mask_diffusion(
    context: ContextTower,
    denoiser: DenoiserTower,
    case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Tokens and denoiser calls of each row's generation, then the recorded trace."""
    eos = case["info"].get("eos_token_id")
    alone = case["info"].get("alone") or {}
    for row, prompt in enumerate(tensors["prompt"].tolist()):
        output = tensors.get(f"alone.{row}.output", tensors["output"][row : row + 1])[0]
        params = _params(case, "mask_diffusion", eos)
        tokens, nfe = asyncio.run(_generate(context, denoiser, prompt, params))
        report.same(f"output[{row}]", tokens, _up_to_eos(output[len(prompt) :].tolist(), eos))
        want_nfe = alone[str(row)]["nfe"] if alone else case["info"]["nfe"]
        report.same(f"nfe[{row}]", nfe, want_nfe)
    _replay_trace(context, denoiser, case, tensors, report)


def _replay_trace(
    context: ContextTower,
    denoiser: DenoiserTower,
    case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Repeats every recorded denoiser call from its recorded input; blocks that are done extend
    the context."""
    prompts = tensors["prompt"].tolist()
    states = context.new_states(len(prompts), tensors["output"].shape[1])
    for prompt, state in zip(prompts, states, strict=True):
        read_tokens(context, prompt, state)
    drafts: list[BlockDraft] = []
    for call in range(len(tensors["trace.block_idx"])):
        if tensors["trace.step_idx"][call] == 0:
            if drafts:
                _append_blocks(context, tensors["trace.xt_after"][call - 1].tolist(), states)
            drafts = [_draft(case, denoiser.config.mask_token_id) for _ in prompts]
        _replay_call(denoiser, tensors, call, states, drafts, report)


def _append_blocks(
    context: ContextTower, blocks: Sequence[list[int]], states: Sequence[ContextState]
) -> None:
    for block, state in zip(blocks, states, strict=True):
        context.forward([block], [state])
        context.advance(state, len(block))


def _replay_call(
    denoiser: DenoiserTower,
    tensors: Recorded,
    call: int,
    states: Sequence[ContextState],
    drafts: Sequence[BlockDraft],
    report: CaseReport,
) -> None:
    """Compares timestep, predictions, confidences and commits of a denoiser call of all rows."""
    blocks = tensors["trace.xt_before"][call].tolist()
    t = float(tensors["trace.t"][call])
    hidden = denoiser.forward(blocks, [t] * len(blocks), states)
    logits = denoiser.logits(hidden).unflatten(0, (len(blocks), -1))
    if call == 0 and "first_logits" in tensors:
        report.close("first_logits", logits, tensors["first_logits"], LOGIT_TOLERANCE)
    mean_masked = sum(draft.timestep for draft in drafts) / len(drafts)
    report.same(f"t[{call}]", round(mean_masked, 5), round(t, 5))
    for row, draft in enumerate(drafts):
        if draft.done:
            continue
        report.same(f"xt_before[{call},{row}]", draft.token_ids, blocks[row])
        picked = logits[row][draft.masked]
        batch = _greedy(picked, denoiser.config.mask_token_id)
        tokens, confidences, _, _ = dispatch.predict(picked, batch)
        want = tensors["trace.predicted"][call, row][draft.masked].tolist()
        report.same(f"predicted[{call},{row}]", tokens.tolist(), want)
        recorded = tensors["trace.confidence"][call, row][draft.masked]
        report.close(f"confidence[{call},{row}]", confidences, recorded, STATE_TOLERANCE)
        draft.commit(tokens.tolist(), confidences.tolist())
        after = tensors["trace.xt_after"][call, row].tolist()
        report.same(f"xt_after[{call},{row}]", draft.token_ids, after)


def replay_autoregressive(
    context: ContextTower,
    denoiser: DenoiserTower,
    case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Tokens, denoiser calls and logits of a generation token by token, modes ar and mock_ar."""
    mode: Mode = case["kind"]
    eos = case["info"].get("eos_token_id")
    for row, prompt in enumerate(tensors["prompt"].tolist()):
        params = _params(case, mode, eos)
        tokens, nfe = asyncio.run(_generate(context, denoiser, prompt, params))
        want = _up_to_eos(tensors["output"][row][len(prompt) :].tolist(), eos)
        report.same(f"output[{row}]", tokens, want)
        report.same(f"nfe[{row}]", nfe, len(want) if TRAITS[mode].denoiser == "always" else 0)
        logits = _step_logits(context, denoiser, prompt, want, mode)
        recorded = tensors["logits"][row]
        report.close(f"logits[{row}]", logits, recorded[: len(logits)], LOGIT_TOLERANCE)


def _step_logits(
    context: ContextTower,
    denoiser: DenoiserTower,
    prompt: list[int],
    output: list[int],
    mode: Mode,
) -> Tensor:
    """The logits from which each of the n output tokens was taken, [n, V]."""
    if TRAITS[mode].denoiser != "always":
        state = context.new_state(len(prompt) + len(output))
        hidden = read_tokens(context, [*prompt, *output[:-1]], state)
        return context.logits(hidden[len(prompt) - 1 :])
    logits = []
    for count in range(len(output)):
        known = [*prompt, *output[:count]]
        state = context.new_state(len(known))
        if known[:-1]:
            read_tokens(context, known[:-1], state)
        hidden = denoiser.forward([known[-1:]], [None], [state])
        logits.append(denoiser.logits(hidden))
    return torch.cat(logits)


def replay_loop(
    _context: ContextTower,
    denoiser: DenoiserTower,
    case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Unmasking from recorded logits and uniform numbers, without a tower."""
    mask = denoiser.config.mask_token_id
    calls, rows = tensors["logits"].shape[:2]
    drafts: list[BlockDraft] = []
    for call in range(calls):
        if tensors["trace.step_idx"][call] == 0:
            drafts = [_draft(case, mask) for _ in range(rows)]
        for row, draft in enumerate(drafts):
            if draft.done:
                continue
            logits = tensors["logits"][call, row][draft.masked]
            batch, scores = _greedy(logits, mask), None
            if case.get("temperature", 0) > 0:
                temperature = torch.full((len(logits),), case["temperature"])
                scores = tempered(without(logits, batch.excluded), temperature)
                scores = scores + gumbel(tensors["uniform"][call, row][draft.masked])
            if rows == 1:
                report.same(f"t[{call}]", draft.timestep, float(tensors["trace.t"][call]))
            tokens, confidences, _, _ = dispatch.predict(logits, batch, scores)
            draft.commit(tokens.tolist(), confidences.tolist())
            after = tensors["trace.xt_after"][call, row].tolist()
            report.same(f"xt_after[{call},{row}]", draft.token_ids, after)


async def _generate(
    context: ContextTower, denoiser: DenoiserTower, prompt: list[int], params: GenerationParams
) -> tuple[list[int], int]:
    """Token ids and denoiser calls through the engines, as a request would run."""
    denoiser_engine = DenoiserEngine(denoiser)
    link = LocalLink(context, denoiser_engine, shared=True)
    generation = generate_blocks(
        ContextEngine(context, link, EngineOptions(prefix_cache_mib=0)),
        denoiser_engine,
        "row",
        prompt,
        params,
    )
    blocks = [block async for block in committed(generation)]
    tokens = [token for block in blocks for token in block.token_ids]
    return tokens, sum(block.nfe for block in blocks)


def _params(case: Case, mode: Mode, eos_token_id: int | None) -> GenerationParams:
    """The recorded run's sampling parameters."""
    return GenerationParams(
        mode=mode,
        max_tokens=case["max_new_tokens"],
        block_size=case.get("block", 16),
        steps_per_block=case.get("steps", 16),
        confidence_threshold=case.get("gamma", 0.8),
        eos_token_id=eos_token_id,
        seed=0,
        commit_rule="released",
    )


def _draft(case: Case, mask_token_id: int) -> BlockDraft:
    """A block of masks under the recorded run's rule."""
    return BlockDraft(case["block"], mask_token_id, ThresholdRule(case["gamma"], case["steps"]))


def _greedy(logits: Tensor, mask_token_id: int) -> SamplingBatch:
    """Greedy sampling of logits [n, V] in which the mask token cannot be predicted."""
    sampler = Sampler(0.0, None, None, None, key=0)
    draw = Draw(sampler, range(len(logits)), excluded_token=mask_token_id)
    return sampling_batch([draw], logits.device)


def _up_to_eos(tokens: list[int], eos_token_id: int | None) -> list[int]:
    """The tokens up to their first EOS; the reference goes on to the end of the block."""
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
