"""What from_pretrained is given: folder, dtype and devices; and the towers once they are needed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import torch

from twotower.api import TwoTower
from twotower.towers.checkpoint.checkpoint import Checkpoint
from twotower.towers.checkpoint.weights import DTYPES, parse_device
from twotower.towers.config.quantization_config import FP8_EXPERTS
from twotower.towers.errors import ConfigError, InvalidRequestError

TOWERS = ("context_tower", "denoiser_tower")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_STORED = {"BF16": "bfloat16"}
# Keys of a config that a program may set as it likes: they shape no tensor.
_FREE = ("architectures", "bos_token_id", "eos_token_id", "model_type", "pad_token_id")


@dataclass(frozen=True)
class Placement:
    """Devices of the two towers, and the dtype in which both compute, `float32` or `bfloat16`."""

    context: torch.device
    denoiser: torch.device
    dtype: str


class Towers:
    """The towers of a checkpoint that has been checked, read when they are first needed.

    A checkpoint may be larger than a machine's memory: its weights are read straight to where the
    towers are placed, and a program may say so after `from_pretrained`.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        self.checkpoint = checkpoint
        self.placement = placement
        self._model: TwoTower | None = None

    def loaded(self) -> TwoTower:
        """The model, read now if it has not been. Raises CheckpointError, ConfigError."""
        if self._model is None:
            where = self.placement
            devices = where.context, where.denoiser
            self._model = TwoTower.from_pretrained(self.checkpoint.folder, devices, where.dtype)
        return self._model

    def move(self, **changes: Any) -> None:
        """Changes fields of the placement. Towers that are read already are dropped first: two
        copies may not fit."""
        placement = replace(self.placement, **changes)
        if placement == self.placement:
            return
        was_loaded, self._model, self.placement = self._model is not None, None, placement
        if was_loaded:
            self.loaded()


def device_of(value: object) -> torch.device:
    """A device by its name, its number (a GPU) or itself. Raises ConfigError for one that is not
    here."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"cuda:{value}"
    return parse_device(value if isinstance(value, torch.device) else str(value))


def devices_of(device_map: object) -> tuple[torch.device, torch.device]:
    """Devices of context and denoiser tower from `device_map`: None (the CPU), a device for both,
    {"": device}, or a device for each of TOWERS. Raises InvalidRequestError, ConfigError."""
    if isinstance(device_map, dict):
        both = [device_map[""]] * 2 if set(device_map) == {""} else []
        each = [device_map[name] for name in TOWERS] if set(device_map) == {*TOWERS} else both
    elif device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        each = []
    else:
        each = ["cpu" if device_map is None else device_map] * 2
    if not each:
        limit = f"a device, {{'': device}}, or a dict with {TOWERS[0]} and {TOWERS[1]}"
        raise InvalidRequestError("device_map", device_map, limit)
    return device_of(each[0]), device_of(each[1])


def dtype_of(asked: object, checkpoint: Checkpoint) -> str:
    """The name of the dtype that `dtype` or `torch_dtype` asks for: one of DTYPES by name or as
    torch's, or "auto" (or None) for that of the checkpoint: bfloat16 if its heads are stored so,
    otherwise float32, which holds all others. Raises InvalidRequestError."""
    if asked is None or asked == "auto":
        return _STORED.get(checkpoint.dtype_name("context_lm_head.weight"), "float32")
    name = _DTYPE_NAMES.get(asked, asked) if isinstance(asked, torch.dtype) else asked
    if not isinstance(name, str) or name not in DTYPES:
        raise InvalidRequestError("dtype", asked, f"one of {', '.join(DTYPES)} or 'auto'")
    return name


def check_quantization(given: Any, checkpoint: Checkpoint) -> None:
    """Raises InvalidRequestError for a `quantization_config` of another method than that by which
    the checkpoint is stored: nothing is quantized while it is loaded."""
    if given is None:
        return
    stored = FP8_EXPERTS["quant_method"] if checkpoint.config.quantized_experts else None
    method = given.get("quant_method") if isinstance(given, dict) else given.quant_method
    if stored is None or method != stored:
        limit = "none" if stored is None else f"none, or the checkpoint's own, {stored}"
        raise InvalidRequestError("quantization_config", given, f"{limit} (see twotower quantize)")


def check_config(config: Any, checkpoint: Checkpoint) -> None:
    """Raises ConfigError if `config` would shape another model than the checkpoint's config.json:
    what is loaded is what lies there."""
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    for key in checkpoint.config.to_dict():
        if key not in raw or key in _FREE:
            continue
        got = getattr(config, key, None)
        if got != raw[key]:
            raise ConfigError(
                f"{key}: got {got!r}, expected {raw[key]!r} as in the checkpoint's config.json"
            )
