"""Replay of single passes: prefill, extension, a denoiser pass, and scores of a text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.options import PREFILL_CHUNK, EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower, timestep_features
from twotower.towers.state.context_state import ContextState
from twotower.towers.verify.report import (
    LOGIT_TOLERANCE,
    STATE_TOLERANCE,
    Case,
    CaseReport,
    Recorded,
)


def read_tokens(
    context: ContextTower, tokens: Sequence[int], state: ContextState, hold: int = 0
) -> Tensor:
    """Reads tokens in chunks of PREFILL_CHUNK into `state`, whose snapshot advances over all but
    the last `hold`, which stay in the log. Returns all hidden states [T, H]."""
    hidden = []
    cuts = [*range(0, len(tokens) - hold, PREFILL_CHUNK), len(tokens) - hold, len(tokens)]
    for start, stop in pairwise(cuts):
        if start == stop:
            continue
        hidden.append(context.forward([tokens[start:stop]], [state]))
        if stop <= len(tokens) - hold:
            context.advance(state, stop - start)
    return torch.cat(hidden)


def replay_prefill(
    context: ContextTower,
    _denoiser: DenoiserTower,
    _case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Logits of every prompt token, and the state before and after its last token."""
    for row, tokens in enumerate(tensors["tokens"].tolist()):
        state = context.new_state(len(tokens))
        logits = context.logits(read_tokens(context, tokens, state, hold=1))
        report.close("logits_all", logits, tensors["logits_all"][row], LOGIT_TOLERANCE)
        report.close("logits_last", logits[-1], tensors["logits_last"][row], LOGIT_TOLERANCE)
        _compare_snapshot(context, "s2_", state, row, tensors, report)
        context.advance(state, 1)
        _compare_snapshot(context, "", state, row, tensors, report)


def replay_extend(
    context: ContextTower,
    _denoiser: DenoiserTower,
    _case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Logits after a block that extends a prompt, and the state before and after the block."""
    for row, prompt in enumerate(tensors["prompt"].tolist()):
        block = tensors["block"][row].tolist()
        state = context.new_state(len(prompt) + len(block))
        read_tokens(context, prompt, state)
        hidden = context.forward([block], [state])
        logits = context.logits(hidden[-1:])[0]
        report.close("logits_after", logits, tensors["logits_after"][row], LOGIT_TOLERANCE)
        _compare_snapshot(context, "s2_", state, row, tensors, report)
        context.advance(state, len(block))
        _compare_snapshot(context, "", state, row, tensors, report)


def _compare_snapshot(
    context: ContextTower,
    prefix: str,
    state: ContextState,
    row: int,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Compares the Mamba states recorded as `prefix`conv and `prefix`ssm, and, without a prefix,
    the K/V of all tokens."""
    for index, layer in enumerate(context.config.layers_of("M")):
        if f"{prefix}conv.{layer}" not in tensors:
            continue
        # The recorded conv state is [Cd, K] and holds one column more than is ever read.
        recorded = tensors[f"{prefix}conv.{layer}"][row].t()[1:]
        report.close(f"{prefix}conv.{layer}", state.conv[index], recorded, STATE_TOLERANCE)
        recorded = tensors[f"{prefix}ssm.{layer}"][row]
        report.close(f"{prefix}ssm.{layer}", state.ssm[index], recorded, STATE_TOLERANCE)
    for index, layer in enumerate(context.config.layers_of("*")):
        for name, got in zip("kv", state.kv(index, 0, state.length), strict=True):
            if not prefix and f"{name}.{layer}" in tensors:
                recorded = tensors[f"{name}.{layer}"][row]
                report.close(f"{name}.{layer}", got, recorded, STATE_TOLERANCE)


def replay_denoise(
    context: ContextTower,
    denoiser: DenoiserTower,
    _case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """A denoiser pass over blocks at their timesteps: layers' inputs and outputs, and logits."""
    blocks = tensors["xt"].tolist()
    times = tensors["t"].tolist() if "t" in tensors else [None] * len(blocks)
    prompts = tensors["prompt"].tolist()
    states = context.new_states(len(prompts), max(map(len, prompts)))
    for prompt, state in zip(prompts, states, strict=True):
        read_tokens(context, prompt, state)

    def compare(name: str, got: Tensor) -> None:
        if name in tensors:
            recorded = tensors[name]
            report.close(name, got.view(recorded.shape), recorded, STATE_TOLERANCE)

    hidden = denoiser.forward(blocks, times, states, compare)
    recorded = tensors["logits"]
    logits = denoiser.logits(hidden).view(recorded.shape)
    report.close("logits", logits, recorded, LOGIT_TOLERANCE)
    compare("hidden_out_normed", hidden)
    for row, t in enumerate(times):
        if t is not None:
            _compare_timestep(denoiser, t, row, tensors, report)


def _compare_timestep(
    denoiser: DenoiserTower, t: float, row: int, tensors: Recorded, report: CaseReport
) -> None:
    """Compares the stages of the timestep's embedding, and every layer's modulation."""
    features = timestep_features(t, denoiser.dtype, denoiser.device)[0]
    report.close("t_sinusoid", features, tensors["t_sinusoid"][row], STATE_TOLERANCE)
    represented = denoiser.represent_timestep(t)[0]
    report.close("t_repr", represented, tensors["t_repr"][row], STATE_TOLERANCE)
    embedded = denoiser.embed_timestep(t)[0]
    report.close("t_emb", embedded, tensors["t_emb"][row], STATE_TOLERANCE)
    modulation = denoiser.modulation(t)
    for layer in range(denoiser.config.num_layers):
        for part, name in enumerate(("shift", "scale", "gate")):
            if f"{name}.{layer}" in tensors:
                recorded = tensors[f"{name}.{layer}"][row]
                report.close(f"{name}.{layer}", modulation[layer, part], recorded, STATE_TOLERANCE)


def replay_score(
    context: ContextTower,
    _denoiser: DenoiserTower,
    _case: Case,
    tensors: Recorded,
    report: CaseReport,
) -> None:
    """Log-probabilities of a text's tokens, and their sum, through the context engine."""
    engine = ContextEngine(context, options=EngineOptions(prefix_cache_mib=0))
    for row, tokens in enumerate(tensors["tokens"].tolist()):
        scores = torch.tensor(asyncio.run(engine.score(tokens)).log_probs)
        report.close("token_logprobs", scores, tensors["token_logprobs"][row], LOGIT_TOLERANCE)
        total = tensors["sum_logprob"][row]
        report.close("sum_logprob", scores.sum(), total, LOGIT_TOLERANCE * len(tokens))
