"""The calls that generate: those of the released model, and transformers' own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from twotower.towers.config.model_config import MASK_TOKEN_ID
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import Mode
from twotower.transformers.arguments import check_mask_token, pad_token, read_arguments
from twotower.transformers.loading import Towers
from twotower.transformers.rows import Batch, Decoding, token_ids_of

_NEW_TOKENS = 128


class GenerationCalls:
    """`generate` and the released calls, for a model that has towers and a generation config."""

    config: Any
    _towers: Towers
    generation_config: Any

    @torch.no_grad()
    def generate_mask_diffusion(
        self,
        input_ids: Tensor,
        max_new_tokens: int = _NEW_TOKENS,
        block_size: int = 16,
        steps_per_block: int = 16,
        mask_token_id: int = MASK_TOKEN_ID,
        temperature: float = 0.0,
        confidence_threshold: float = 0.9,
        eos_token_id: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Blocks of masks that the denoiser fills in: prompt and output, [B, T + N].

        Differs from the release where that has defects: `max_new_tokens` need not be a multiple of
        `block_size`; a row's timestep is that of its own masks; what follows EOS in a block is
        cut; one-token prompts work. `top_k` and `top_p` narrow a draw with a temperature, where
        the release ignores the one and lacks the other. Raises InvalidRequestError.
        """
        config = self._towers.checkpoint.config
        check_mask_token(config, mask_token_id)
        settings = {
            "block_size": block_size,
            "steps_per_block": steps_per_block,
            "confidence_threshold": confidence_threshold,
            "commit_rule": "released",
        }
        settings |= _draw(max_new_tokens, temperature, top_k, top_p)
        decoding = self._decoding("mask_diffusion", settings, eos_token_id, pad_token_id, seed)
        return decoding.run(self._towers.loaded(), Batch.of(input_ids, attention_mask))

    @torch.no_grad()
    def generate_mock_ar(
        self,
        input_ids: Tensor,
        max_new_tokens: int = _NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The denoiser token by token, from the context before the last one: prompt and output,
        [B, T + N]. Raises InvalidRequestError."""
        settings = _draw(max_new_tokens, temperature, top_k, top_p)
        decoding = self._decoding("mock_ar", settings, eos_token_id, pad_token_id, seed)
        return decoding.run(self._towers.loaded(), Batch.of(input_ids, attention_mask))

    @torch.no_grad()
    def generate_ar(
        self,
        input_ids: Tensor,
        max_new_tokens: int = _NEW_TOKENS,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | None = None,
        attention_mask: Tensor | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """The context tower token by token, without the denoiser: prompt and output, [B, T + N].
        Raises InvalidRequestError."""
        settings = _draw(max_new_tokens, temperature, top_k, top_p)
        decoding = self._decoding("ar", settings, eos_token_id, pad_token_id, seed)
        return decoding.run(self._towers.loaded(), Batch.of(input_ids, attention_mask))

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: Any = None,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """Prompt and output, [B, T + N], as transformers' `generate` of a causal language model.

        `inputs` or `input_ids` with `attention_mask`; without either a row begins with BOS.
        `max_new_tokens` or `max_length` (20 new tokens without them), `min_new_tokens`,
        `min_length`, `do_sample` with `temperature` (1), `top_k` (all tokens), `top_p`, `min_p`;
        `stop_strings`, `stopping_criteria`, `streamer`; `eos_token_id` (the checkpoint's; one, a
        list, or None), `pad_token_id`. Then `generation_config`, or the model's own. Criteria see
        the sequences [B, n] after every token, and no scores.

        `mode` is "ar", the context tower, or mask_diffusion, verified, mock_ar, auto; with the
        knobs `block_size`, `steps_per_block`, `confidence_threshold`, `commit_rule`, `first_token`,
        `draft_steps`, `draft_source`, `acceptance`, `mix_ratio`, `quality`, each in the modes that
        it matters to, whose defaults are those of `TwoTower.generate` but for the release's
        `commit_rule`, and `seed`. Any other argument that would change the output (beams,
        penalties, logits processors, a cache, scores) raises InvalidRequestError with its name.
        """
        ids, mask = kwargs.pop("input_ids", None), kwargs.pop("attention_mask", None)
        if ids is not None and inputs is not None:
            raise InvalidRequestError("inputs", "ids", "none beside input_ids")
        batch = Batch.of(self._begin(inputs if ids is None else ids), mask)
        defaults = self.generation_config if generation_config is None else generation_config
        call = {
            **kwargs,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
        }
        config = self._towers.checkpoint.config
        decoding = read_arguments(config, batch.width, call, _said(defaults))
        return decoding.run(self._towers.loaded(), batch)

    def _begin(self, input_ids: Tensor | None) -> Tensor:
        if input_ids is not None:
            return input_ids
        if self.config.bos_token_id is None:
            raise InvalidRequestError("input_ids", None, "token ids, as there is no BOS token")
        return torch.tensor([[self.config.bos_token_id]])

    def _decoding(
        self, mode: Mode, settings: dict[str, Any], eos: object, pad: object, seed: int | None
    ) -> Decoding:
        ends = token_ids_of("eos_token_id", eos)
        padding = pad_token(self._towers.checkpoint.config, ends, pad)
        return Decoding({"mode": mode, **settings}, ends, padding, seed)


def _draw(
    max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None
) -> dict[str, Any]:
    """What the released calls share, as parameters of this package."""
    return {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }


def _said(generation_config: Any) -> dict[str, Any]:
    """The values that a generation config states."""
    stated = vars(generation_config).items()
    return {
        name: value
        for name, value in stated
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }
