"""Replays recorded cases of a reference run against the installed kernels on a device.

A folder holds a checkpoint, `golden.safetensors` and `manifest.json`. Token ids, traces and the
number of denoiser calls must be equal, floats within the tolerances below. Where a recorded batch
was coupled through a shared timestep, the rows' results alone are the truth.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.dispatch import Backend, force
from twotower.kernels.unmask import SamplingBatch, gumbel, tempered, without
from twotower.towers.checkpoint.weights import (
    load_context_tower,
    load_denoiser_tower,
    parse_device,
    parse_dtype,
)
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.sampling import Draw, Sampler, sampling_batch
from twotower.towers.decoding.unmasking import BlockDraft, ThresholdRule
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.prefill import PREFILL_CHUNK
from twotower.towers.errors import CheckpointError, cut_off
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower, timestep_features
from twotower.towers.request.modes import TRAITS, Mode
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState

LOGIT_TOLERANCE = 2e-3
STATE_TOLERANCE = 5e-4
Case = Mapping[str, Any]


@dataclass
class CaseReport:
    """What one case compared: number of checks, largest float error, and what was wrong."""

    case_id: str
    kind: str
    checks: int = 0
    max_error: float = 0.0
    misses: list[str] = field(default_factory=list)

    def close(self, name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
        """Compares floats of one shape."""
        self.checks += 1
        got = got.detach().float().cpu()
        if got.shape != want.shape:
            self.misses.append(f"{name}: shape {list(got.shape)}, expected {list(want.shape)}")
            return
        error = float((got - want.float()).abs().max()) if want.numel() else 0.0
        self.max_error = max(self.max_error, error)
        if not error <= tolerance:
            self.misses.append(f"{name}: off by {error:.2e}, limit {tolerance:.0e}")

    def same(self, name: str, got: object, want: object) -> None:
        """Compares token ids and counts exactly."""
        self.checks += 1
        if got != want:
            self.misses.append(
                f"{name}: got {cut_off(str(got), 60)}, expected {cut_off(str(want), 60)}"
            )

    def line(self) -> str:
        """One line for the terminal."""
        verdict = "ok  " if not self.misses else "MISS"
        text = f"{verdict} {self.kind:<14} {self.case_id:<16} {self.checks:>4} checks"
        text += f"  max error {self.max_error:.1e}"
        return text if not self.misses else f"{text}  {'; '.join(self.misses[:3])}"


def verify_folder(
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
    report: Callable[[str], None] = print,
    backend: Backend | None = None,
    kinds: Sequence[str] = (),
) -> bool:
    """Replays every case of `folder`, reports a line for each and a summary; True if all hold.

    `backend` (None: by device) is `reference` or `triton`; `kinds` of cases, all if none is given.
    Raises CheckpointError if the folder has no readable cases or its checkpoint is wrong.
    """
    with force(backend) if backend is not None else nullcontext():
        return _verify(folder, device, dtype, report, backend, kinds)


def _verify(
    folder: Path,
    device: str,
    dtype: str,
    report: Callable[[str], None],
    backend: Backend | None,
    kinds: Sequence[str],
) -> bool:
    place = parse_device(device)
    cases, tensors = _read_cases(folder)
    cases = [case for case in cases if not kinds or case["kind"] in kinds]
    for_triton = None if backend is None else backend == "triton"
    replayer = _Replayer(
        load_context_tower(folder, place, parse_dtype(dtype), for_triton=for_triton),
        load_denoiser_tower(folder, place, parse_dtype(dtype), for_triton=for_triton),
    )
    missed = 0
    for case in cases:
        own = {
            key.split("/", 1)[1]: value
            for key, value in tensors.items()
            if key.split("/", 1)[0] == case["id"]
        }
        result = replayer.replay(case, own)
        missed += bool(result.misses)
        report(result.line())
    report(f"{len(cases) - missed} of {len(cases)} cases hold ({folder.name}, {device}, {dtype})")
    return missed == 0


def _read_cases(folder: Path) -> tuple[list[Case], dict[str, Tensor]]:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        cases = manifest["cases"]
        tensors = load_file(folder / manifest.get("tensor_file", "golden.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: no readable manifest.json and golden.safetensors ({error})"
        ) from None
    if not cases:
        raise CheckpointError(f"{folder}: manifest.json lists no cases")
    return cases, tensors


class _Replayer:
    """Runs single cases; one method per kind."""

    def __init__(self, context: ContextTower, denoiser: DenoiserTower) -> None:
        self.context = context
        self.denoiser = denoiser
        self._kinds: dict[str, Callable[[Case, Mapping[str, Tensor], CaseReport], None]] = {
            "prefill": self._prefill,
            "extend": self._extend,
            "denoise": self._denoise,
            "mask_diffusion": self._mask_diffusion,
            "ar": self._autoregressive,
            "mock_ar": self._autoregressive,
            "score": self._score,
            "loop": self._loop,
        }

    def replay(self, case: Case, tensors: Mapping[str, Tensor]) -> CaseReport:
        result = CaseReport(case["id"], case["kind"])
        if case["kind"] not in self._kinds:
            result.misses.append(f"kind {case['kind']!r} is unknown")
        else:
            self._kinds[case["kind"]](case, tensors, result)
        return result

    def _read(self, tokens: Sequence[int], state: ContextState, hold: int = 0) -> Tensor:
        """Reads tokens on the grid; the last `hold` stay in the log. All hidden states [T, H]."""
        hidden = []
        cuts = [*range(0, len(tokens) - hold, PREFILL_CHUNK), len(tokens) - hold, len(tokens)]
        for start, stop in pairwise(cuts):
            if start == stop:
                continue
            hidden.append(self.context.forward([tokens[start:stop]], [state]))
            if stop <= len(tokens) - hold:
                self.context.advance(state, stop - start)
        return torch.cat(hidden)

    def _prefill(self, _case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        for row, tokens in enumerate(tensors["tokens"].tolist()):
            state = self.context.new_state(len(tokens))
            logits = self.context.logits(self._read(tokens, state, hold=1))
            result.close("logits_all", logits, tensors["logits_all"][row], LOGIT_TOLERANCE)
            result.close("logits_last", logits[-1], tensors["logits_last"][row], LOGIT_TOLERANCE)
            self._compare_snapshot("s2_", state, row, tensors, result)
            self.context.advance(state, 1)
            self._compare_snapshot("", state, row, tensors, result)

    def _extend(self, _case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        for row, prompt in enumerate(tensors["prompt"].tolist()):
            block = tensors["block"][row].tolist()
            state = self.context.new_state(len(prompt) + len(block))
            self._read(prompt, state)
            hidden = self.context.forward([block], [state])
            logits = self.context.logits(hidden[-1:])[0]
            result.close("logits_after", logits, tensors["logits_after"][row], LOGIT_TOLERANCE)
            self._compare_snapshot("s2_", state, row, tensors, result)
            self.context.advance(state, len(block))
            self._compare_snapshot("", state, row, tensors, result)

    def _compare_snapshot(
        self,
        prefix: str,
        state: ContextState,
        row: int,
        tensors: Mapping[str, Tensor],
        result: CaseReport,
    ) -> None:
        config = self.context.config
        for index, layer in enumerate(config.layers_of("M")):
            if f"{prefix}conv.{layer}" not in tensors:
                continue
            # The recorded conv state is [Cd, K] and holds one column more than is ever read.
            recorded = tensors[f"{prefix}conv.{layer}"][row].t()[1:]
            result.close(f"{prefix}conv.{layer}", state.conv[index], recorded, STATE_TOLERANCE)
            recorded = tensors[f"{prefix}ssm.{layer}"][row]
            result.close(f"{prefix}ssm.{layer}", state.ssm[index], recorded, STATE_TOLERANCE)
        for index, layer in enumerate(config.layers_of("*")):
            for name, own in zip("kv", state.kv(index, 0, state.length), strict=True):
                if not prefix and f"{name}.{layer}" in tensors:
                    recorded = tensors[f"{name}.{layer}"][row]
                    result.close(f"{name}.{layer}", own, recorded, STATE_TOLERANCE)

    def _denoise(self, _case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        blocks = tensors["xt"].tolist()
        times = tensors["t"].tolist() if "t" in tensors else [None] * len(blocks)
        prompts = tensors["prompt"].tolist()
        states = self.context.new_states(len(prompts), max(map(len, prompts)))
        for prompt, state in zip(prompts, states, strict=True):
            self._read(prompt, state)

        def compare(name: str, got: Tensor) -> None:
            if name in tensors:
                recorded = tensors[name]
                result.close(name, got.view(recorded.shape), recorded, STATE_TOLERANCE)

        hidden = self.denoiser.forward(blocks, times, states, compare)
        shape = tensors["logits"].shape
        result.close(
            "logits", self.denoiser.logits(hidden).view(shape), tensors["logits"], LOGIT_TOLERANCE
        )
        compare("hidden_out_normed", hidden)
        for row, t in enumerate(times):
            if t is not None:
                self._compare_timestep(t, row, tensors, result)

    def _compare_timestep(
        self, t: float, row: int, tensors: Mapping[str, Tensor], result: CaseReport
    ) -> None:
        features = timestep_features(t, self.denoiser.dtype, self.denoiser.device)[0]
        result.close("t_sinusoid", features, tensors["t_sinusoid"][row], STATE_TOLERANCE)
        represented = self.denoiser.represent_timestep(t)[0]
        result.close("t_repr", represented, tensors["t_repr"][row], STATE_TOLERANCE)
        embedded = self.denoiser.embed_timestep(t)[0]
        result.close("t_emb", embedded, tensors["t_emb"][row], STATE_TOLERANCE)
        modulation = self.denoiser.modulation(t)
        for layer in range(self.denoiser.config.num_layers):
            for part, name in enumerate(("shift", "scale", "gate")):
                if f"{name}.{layer}" in tensors:
                    recorded = tensors[f"{name}.{layer}"][row]
                    result.close(
                        f"{name}.{layer}", modulation[layer, part], recorded, STATE_TOLERANCE
                    )

    def _mask_diffusion(
        self, case: Case, tensors: Mapping[str, Tensor], result: CaseReport
    ) -> None:
        prompts = tensors["prompt"].tolist()
        eos = case["info"].get("eos_token_id")
        alone = case["info"].get("alone") or {}
        for row, prompt in enumerate(prompts):
            output = tensors.get(f"alone.{row}.output", tensors["output"][row : row + 1])[0]
            params = _params(case, "mask_diffusion", eos)
            tokens, nfe = self._generate(prompt, params)
            want = _up_to_eos(output[len(prompt) :].tolist(), eos)
            result.same(f"output[{row}]", tokens, want)
            want_nfe = alone[str(row)]["nfe"] if alone else case["info"]["nfe"]
            result.same(f"nfe[{row}]", nfe, want_nfe)
        self._replay_trace(case, tensors, result)

    def _replay_trace(self, case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        """Every recorded denoiser call by itself, then the recorded run's decisions."""
        prompts = tensors["prompt"].tolist()
        states = self.context.new_states(len(prompts), tensors["output"].shape[1])
        for prompt, state in zip(prompts, states, strict=True):
            self._read(prompt, state)
        drafts: list[BlockDraft] = []
        for call in range(len(tensors["trace.block_idx"])):
            if tensors["trace.step_idx"][call] == 0:
                if drafts:
                    self._append_blocks(tensors, call - 1, states)
                drafts = [_draft(case, self.denoiser.config.mask_token_id) for _ in prompts]
            self._replay_call(tensors, call, states, drafts, result)

    def _append_blocks(
        self, tensors: Mapping[str, Tensor], call: int, states: list[ContextState]
    ) -> None:
        for row, state in enumerate(states):
            block = tensors["trace.xt_after"][call, row].tolist()
            self.context.forward([block], [state])
            self.context.advance(state, len(block))

    def _replay_call(
        self,
        tensors: Mapping[str, Tensor],
        call: int,
        states: list[ContextState],
        drafts: list[BlockDraft],
        result: CaseReport,
    ) -> None:
        blocks = tensors["trace.xt_before"][call].tolist()
        t = float(tensors["trace.t"][call])
        hidden = self.denoiser.forward(blocks, [t] * len(blocks), states)
        logits = self.denoiser.logits(hidden).unflatten(0, (len(blocks), -1))
        if call == 0 and "first_logits" in tensors:
            result.close("first_logits", logits, tensors["first_logits"], LOGIT_TOLERANCE)
        mask = self.denoiser.config.mask_token_id
        mean_masked = sum(draft.timestep for draft in drafts) / len(drafts)
        result.same(f"t[{call}]", round(mean_masked, 5), round(t, 5))
        for row, draft in enumerate(drafts):
            if draft.done:
                continue
            result.same(f"xt_before[{call},{row}]", draft.token_ids, blocks[row])
            picked = logits[row][draft.masked]
            tokens, confidences, _, _ = dispatch.predict(picked, _greedy(picked, mask))
            want = tensors["trace.predicted"][call, row][draft.masked].tolist()
            result.same(f"predicted[{call},{row}]", tokens.tolist(), want)
            recorded = tensors["trace.confidence"][call, row][draft.masked]
            result.close(f"confidence[{call},{row}]", confidences, recorded, STATE_TOLERANCE)
            draft.commit(tokens.tolist(), confidences.tolist())
            after = tensors["trace.xt_after"][call, row].tolist()
            result.same(f"xt_after[{call},{row}]", draft.token_ids, after)

    def _autoregressive(
        self, case: Case, tensors: Mapping[str, Tensor], result: CaseReport
    ) -> None:
        mode: Mode = case["kind"]
        eos = case["info"].get("eos_token_id")
        for row, prompt in enumerate(tensors["prompt"].tolist()):
            params = _params(case, mode, eos)
            tokens, nfe = self._generate(prompt, params)
            want = _up_to_eos(tensors["output"][row][len(prompt) :].tolist(), eos)
            result.same(f"output[{row}]", tokens, want)
            result.same(f"nfe[{row}]", nfe, len(want) if TRAITS[mode].needs_denoiser else 0)
            logits = self._step_logits(prompt, want, mode)
            recorded = tensors["logits"][row]
            result.close(f"logits[{row}]", logits, recorded[: len(logits)], LOGIT_TOLERANCE)

    def _step_logits(self, prompt: list[int], output: list[int], mode: Mode) -> Tensor:
        """The logits that each output token was taken from, [n, V]."""
        if not TRAITS[mode].needs_denoiser:
            state = self.context.new_state(len(prompt) + len(output))
            hidden = self._read([*prompt, *output[:-1]], state)
            return self.context.logits(hidden[len(prompt) - 1 :])
        logits = []
        for count in range(len(output)):
            known = [*prompt, *output[:count]]
            state = self.context.new_state(len(known))
            if known[:-1]:
                self._read(known[:-1], state)
            hidden = self.denoiser.forward([known[-1:]], [None], [state])
            logits.append(self.denoiser.logits(hidden))
        return torch.cat(logits)

    def _score(self, _case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        engine = ContextEngine(self.context)
        for row, tokens in enumerate(tensors["tokens"].tolist()):
            scores = torch.tensor(asyncio.run(engine.score(tokens)))
            recorded = tensors["token_logprobs"][row]
            result.close("token_logprobs", scores, recorded, LOGIT_TOLERANCE)
            total = tensors["sum_logprob"][row]
            result.close("sum_logprob", scores.sum(), total, LOGIT_TOLERANCE * len(tokens))

    def _loop(self, case: Case, tensors: Mapping[str, Tensor], result: CaseReport) -> None:
        """The unmasking alone: given logits and uniforms, no model."""
        mask = self.denoiser.config.mask_token_id
        rows = tensors["logits"].shape[1]
        drafts: list[BlockDraft] = []
        for call in range(tensors["logits"].shape[0]):
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
                    result.same(f"t[{call}]", draft.timestep, float(tensors["trace.t"][call]))
                tokens, confidences, _, _ = dispatch.predict(logits, batch, scores)
                draft.commit(tokens.tolist(), confidences.tolist())
                after = tensors["trace.xt_after"][call, row].tolist()
                result.same(f"xt_after[{call},{row}]", draft.token_ids, after)

    def _generate(self, prompt: list[int], params: GenerationParams) -> tuple[list[int], int]:
        """Tokens and denoiser calls through the engines, as a request would run."""
        return asyncio.run(self._collect(prompt, params))

    async def _collect(self, prompt: list[int], params: GenerationParams) -> tuple[list[int], int]:
        denoiser = DenoiserEngine(self.denoiser)
        context = ContextEngine(self.context, LocalLink(self.context, denoiser, shared=True))
        blocks = [
            block async for block in generate_blocks(context, denoiser, "row", prompt, params)
        ]
        tokens = [token for block in blocks for token in block.token_ids]
        return tokens, sum(block.nfe for block in blocks)


def _params(case: Case, mode: Mode, eos_token_id: int | None) -> GenerationParams:
    return GenerationParams(
        mode=mode,
        max_tokens=case["max_new_tokens"],
        block_size=case.get("block", 16),
        steps_per_block=case.get("steps", 16),
        confidence_threshold=case.get("gamma", 0.8),
        eos_token_id=eos_token_id,
        seed=0,
    )


def _draft(case: Case, mask_token_id: int) -> BlockDraft:
    return BlockDraft(case["block"], mask_token_id, ThresholdRule(case["gamma"], case["steps"]))


def _greedy(logits: Tensor, mask_token_id: int) -> SamplingBatch:
    """Lines without noise, in which the mask token cannot be predicted."""
    sampler = Sampler(0.0, None, None, None, key=0)
    draw = Draw(sampler, range(len(logits)), excluded_token=mask_token_id)
    return sampling_batch([draw], logits.device)


def _up_to_eos(tokens: list[int], eos_token_id: int | None) -> list[int]:
    """The reference goes on to the end of the block; a row ends at its first EOS."""
    return tokens[: tokens.index(eos_token_id) + 1] if eos_token_id in tokens else tokens
