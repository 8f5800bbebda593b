"""Both towers of a checkpoint as a model of transformers, with the calls of the released one."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from twotower.towers.checkpoint.checkpoint import Checkpoint, tensor_shapes
from twotower.towers.checkpoint.weights import DTYPES, resolve_checkpoint
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_whole
from twotower.transformers.calls import GenerationCalls
from twotower.transformers.config import NemotronHTwoTowerConfig
from twotower.transformers.loading import (
    Placement,
    Towers,
    check_config,
    check_quantization,
    device_of,
    devices_of,
    dtype_of,
)
from twotower.transformers.neutral import FORWARD, FROM_PRETRAINED, check_neutral, refuse_adapter
from twotower.transformers.rows import Batch

_HUB = ("revision", "cache_dir", "token", "force_download", "local_files_only")
_IGNORED_LABEL = -100


class NemotronHTwoTowerForCausalLM(GenerationCalls, PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # no types
    """A two-tower checkpoint with the calls of the released model, run by this package.

    `generate_mask_diffusion`, `generate_mock_ar`, `generate_ar` and `place_towers_on_devices` are
    the released calls, `forward` and `generate` those of a causal language model: the context
    tower. Their inputs are ids [B, T], their results hold prompt and output, [B, T + N].

    Rows are independent: each gets what it gets alone, stops at its own first EOS token, and is
    filled with the padding token behind it. Tokens that `attention_mask` [B, T] hides (most often
    padding on the left) are no part of a row; the result repeats the input with its padding. In
    the release a batch has no padding, shares the timestep and stops as a whole.

    The weights are frozen and are no parameters of the module (`device` and `dtype` are
    properties); they can neither be trained, nor saved from here. They are read from the checkpoint
    when they are first needed.
    """

    config_class = NemotronHTwoTowerConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: NemotronHTwoTowerConfig, towers: Towers | None = None) -> None:
        super().__init__(config)
        if towers is None:
            raise InvalidRequestError(
                "config", type(config).__name__, "from_pretrained: weights come from a checkpoint"
            )
        self._towers = towers
        self.generation_config = GenerationConfig(
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
        )
        self._note_dtype()
        super().train(False)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: Any = None,
        dtype: object = None,
        torch_dtype: object = None,
        device_map: object = None,
        quantization_config: object = None,
        **kwargs: Any,
    ) -> NemotronHTwoTowerForCausalLM:
        """A checkpoint's folder or hub id, whose names and shapes of tensors are checked now.

        `dtype` (or `torch_dtype`, its older name) is float32 or bfloat16, by name or as torch's, or
        "auto", the default: that of the checkpoint. `device_map` is a device for both towers, or
        {"context_tower": ..., "denoiser_tower": ...}; without one they are on the CPU until
        `place_towers_on_devices` or `to`, and are read when they are first needed. Hub options
        are those of transformers; `trust_remote_code` is taken and no such code is run. A
        generation_config.json is not read: what a call does not say is as its docstring says.

        Raises CheckpointError, ConfigError, naming the tensor or key, and InvalidRequestError for
        an argument that is not computed here.
        """
        hub = {name: kwargs.pop(name) for name in _HUB if kwargs.get(name) is not None}
        check_neutral({key: kwargs[key] for key in kwargs if key not in _HUB}, FROM_PRETRAINED)
        refuse_adapter(kwargs)
        folder = resolve_checkpoint(pretrained_model_name_or_path, **hub)
        checkpoint = Checkpoint(folder)
        if config is None:
            config = cls.config_class(**cls.config_class.get_config_dict(folder)[0])
        check_config(config, checkpoint)
        check_quantization(quantization_config, checkpoint)
        name = dtype_of(torch_dtype if dtype is None else dtype, checkpoint)
        towers = Towers(checkpoint, Placement(*devices_of(device_map), name))
        model = cls(config, towers)
        model.name_or_path = str(pretrained_model_name_or_path)
        if device_map is not None:
            towers.loaded()
        return model

    def place_towers_on_devices(
        self, context_device: str | torch.device, denoiser_device: str | torch.device
    ) -> NemotronHTwoTowerForCausalLM:
        """Puts each tower on a device (`cpu`, `cuda:0`, or a GPU's number): `context_device` reads,
        `denoiser_device` denoises. Raises ConfigError for a device that is not here."""
        context, denoiser = device_of(context_device), device_of(denoiser_device)
        self._towers.move(context=context, denoiser=denoiser)
        return self

    def to(self, device: Any = None, dtype: Any = None) -> NemotronHTwoTowerForCausalLM:
        """Moves both towers to a device, or to a dtype, which may also be the first argument."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        changes: dict[str, Any] = {}
        if dtype is not None:
            changes["dtype"] = dtype_of(dtype, self._towers.checkpoint)
        if device is not None:
            changes["context"] = changes["denoiser"] = device_of(device)
        self._towers.move(**changes)
        self._note_dtype()
        return self

    def cpu(self) -> NemotronHTwoTowerForCausalLM:
        """As `to("cpu")`."""
        return self.to("cpu")

    def cuda(self, device: int | None = None) -> NemotronHTwoTowerForCausalLM:
        """As `to("cuda")`, or to the GPU of that number."""
        return self.to("cuda" if device is None else device)

    def float(self) -> NemotronHTwoTowerForCausalLM:
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def bfloat16(self) -> NemotronHTwoTowerForCausalLM:
        """As `to(torch.bfloat16)`."""
        return self.to(torch.bfloat16)

    def half(self) -> NemotronHTwoTowerForCausalLM:
        """Raises InvalidRequestError: fp16 is not computed."""
        return self.to(torch.float16)

    def double(self) -> NemotronHTwoTowerForCausalLM:
        """Raises InvalidRequestError: fp64 is not computed."""
        return self.to(torch.float64)

    def train(self, mode: bool = True) -> NemotronHTwoTowerForCausalLM:
        """Only for `eval()`, which changes nothing. Raises InvalidRequestError with `mode`."""
        if mode:
            raise InvalidRequestError("mode", mode, "False: both towers are frozen")
        return self

    def tie_weights(self, *_args: Any, **_kwargs: Any) -> None:
        """Does nothing: no weights of this model are tied."""

    @property
    def device(self) -> torch.device:
        """The context tower's device."""
        return self._towers.placement.context

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which both towers compute."""
        return DTYPES[self._towers.placement.dtype]

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of weights of both towers; none of them can be trained."""
        if only_trainable:
            return 0
        shapes = tensor_shapes(self._towers.checkpoint.config).items()
        counted = [s for name, s in shapes if not (exclude_embeddings and "embeddings" in name)]
        return sum(map(prod, counted))

    def save_pretrained(self, save_directory: str | Path, **_kwargs: Any) -> NoReturn:
        """Raises InvalidRequestError: the checkpoint's folder is the model."""
        folder = self._towers.checkpoint.folder
        limit = f"a copy of {folder}: weights are not changed here, nor written"
        raise InvalidRequestError("save_directory", str(save_directory), limit)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """The context tower's logits [B, T, V] in the model's dtype; at a token they predict the
        next one. At tokens that `attention_mask` hides they are 0.

        With `labels` [B, T] (those of token p are compared with the logits before it, -100 and
        hidden tokens count for nothing) `loss` is the mean cross-entropy. `logits_to_keep` n > 0
        keeps the last n logits only. Raises InvalidRequestError.
        """
        check_neutral(kwargs, FORWARD)
        check_whole("logits_to_keep", logits_to_keep, 0)
        batch = Batch.of(input_ids, attention_mask)
        rows = self._towers.loaded().logits(batch.rows)
        shape = (*input_ids.shape, self.config.vocab_size)
        logits = torch.zeros(shape, dtype=self.dtype, device=input_ids.device)
        seen = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            seen = attention_mask.to(input_ids.device).bool()
        for row, (values, mask) in enumerate(zip(rows, seen, strict=True)):
            logits[row, mask] = values.to(input_ids.device)
        loss = None if labels is None else _loss(logits, labels, seen)
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, -logits_to_keep:])

    def _note_dtype(self) -> None:
        self.config.dtype = self.dtype


def _loss(logits: Tensor, labels: Tensor, seen: Tensor) -> Tensor:
    """Mean cross-entropy of labels [B, T] under the logits [B, T, V] of the token before each."""
    if labels.shape != seen.shape:
        limit = f"the shape of input_ids, {list(seen.shape)}"
        raise InvalidRequestError("labels", f"shape {list(labels.shape)}", limit)
    counts = seen[:, 1:] & seen[:, :-1]
    targets = labels.to(seen.device)[:, 1:].masked_fill(~counts, _IGNORED_LABEL)
    flat = logits[:, :-1].float().flatten(0, 1)
    return functional.cross_entropy(flat, targets.flatten(), ignore_index=_IGNORED_LABEL)
