"""The checkpoint's config.json as a frozen dataclass.

Keys follow the released Nemotron-H schema. A key either shapes the model (a field here), or is
known to change nothing at inference (`config_keys`), or is refused by name, so that none is ignored
by accident.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.towers.config import quantization_config
from twotower.towers.config.config_keys import ATTENTION, MAMBA, MLP, MOE, PATTERN_KEY, plain_keys
from twotower.towers.errors import ConfigError

__all__ = [
    "ATTENTION",
    "LAYER_KINDS",
    "MAMBA",
    "MASK_TOKEN_ID",
    "MLP",
    "MOE",
    "TIMESTEP_FEATURES",
    "TwoTowerConfig",
]

LAYER_KINDS = frozenset((MAMBA, ATTENTION, MOE, MLP))
MASK_TOKEN_ID = 3
TIMESTEP_FEATURES = 256


@dataclass(frozen=True)
class TwoTowerConfig:
    """Shapes and constants of a tower; both towers have the same.

    `layer_pattern` has a letter per residual layer: `M` Mamba-2, `*` attention, `E` MoE, `-` dense
    MLP. With `quantized_experts` the routed experts are stored in 8 bits. Raises ConfigError for
    values that contradict each other.
    """

    vocab_size: int
    hidden_size: int
    layer_pattern: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mamba_num_heads: int
    mamba_head_dim: int
    n_groups: int
    ssm_state_size: int
    conv_kernel: int
    n_routed_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    moe_shared_expert_intermediate_size: int
    intermediate_size: int
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float
    layer_norm_epsilon: float
    max_position_embeddings: int
    use_bias: bool = False
    use_conv_bias: bool = True
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = 0
    mask_token_id: int = MASK_TOKEN_ID
    quantized_experts: bool = False

    @property
    def num_layers(self) -> int:
        return len(self.layer_pattern)

    @property
    def d_inner(self) -> int:
        """Channels of a Mamba mixer, Di."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of a Mamba mixer's convolution, Cd: x, B and C."""
        return self.d_inner + 2 * self.n_groups * self.ssm_state_size

    def layers_of(self, kind: str) -> tuple[int, ...]:
        """Indices of the layers of a kind (`M`, `*`, `E` or `-`)."""
        return tuple(i for i, letter in enumerate(self.layer_pattern) if letter == kind)

    def __post_init__(self) -> None:
        unknown = set(self.layer_pattern) - LAYER_KINDS
        if unknown or not self.layer_pattern:
            raise ConfigError(
                f"{PATTERN_KEY}: got {self.layer_pattern!r}, expected letters of 'M*E-'"
            )
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for whole, part in _DIVISIBLE:
            if getattr(self, whole) % getattr(self, part):
                raise ConfigError(
                    f"{whole}: got {getattr(self, whole)}, expected a multiple of "
                    f"{part} = {getattr(self, part)}"
                )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ConfigError(
                f"num_experts_per_tok: got {self.num_experts_per_tok}, "
                f"expected at most n_routed_experts = {self.n_routed_experts}"
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"topk_group: got {self.topk_group}, expected 1 to n_group = {self.n_group}"
            )
        for name, zero_allowed in (("layer_norm_epsilon", False), ("routed_scaling_factor", True)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero_allowed):
                raise ConfigError(f"{name}: got {value}, expected a positive finite number")
        for name in _TOKEN_IDS:
            token = getattr(self, name)
            if token is not None and not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"{name}: got {token}, expected null or an id below "
                    f"vocab_size = {self.vocab_size}"
                )
        if self.mask_token_id >= self.vocab_size:
            raise ConfigError(
                f"vocab_size: got {self.vocab_size}, expected more than the mask token id "
                f"{self.mask_token_id}"
            )

    @classmethod
    def from_file(cls, path: Path) -> TwoTowerConfig:
        """Reads a config.json, with `Infinity` bare or as transformers 5 tags it. Raises
        ConfigError."""
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path.name}: not found in {path.parent}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise ConfigError(f"{path.name}: not readable as JSON ({error})") from None
        if not isinstance(raw, dict):
            raise ConfigError(f"{path.name}: expected an object, got {type(raw).__name__}")
        return cls.from_dict(raw)

    @classmethod
    def from_dict(cls, raw: dict[str, Any]) -> TwoTowerConfig:
        """Builds the config from released keys; raises ConfigError naming the offending key."""
        plain = plain_keys(raw, {*_REQUIRED, *_OPTIONAL, quantization_config.KEY})
        values = {name: _typed(plain, key, kind) for key, (name, kind) in _REQUIRED.items()}
        for key, kind in _OPTIONAL.items():
            if plain.get(key) is not None:
                values[key] = _typed(plain, key, kind)
            elif key in plain and key in _TOKEN_IDS:
                values[key] = None
        if plain.get(quantization_config.KEY) is not None:
            quantization_config.check_quantization_config(plain[quantization_config.KEY])
            values["quantized_experts"] = True
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The config under the released keys, for writing a config.json."""
        names = {name: key for key, (name, _) in _REQUIRED.items()}
        body = {names.get(k, k): v for k, v in self.__dict__.items() if k not in _NOT_KEYS}
        if self.quantized_experts:
            body[quantization_config.KEY] = quantization_config.FP8_EXPERTS
        return {
            "architectures": ["NemotronHTwoTowerForCausalLM"],
            "model_type": "nemotron_h",
            "num_hidden_layers": self.num_layers,
            "mamba_hidden_act": "silu",
            "mlp_hidden_act": "relu2",
            "tie_word_embeddings": False,
            "n_shared_experts": 1,
            "chunk_size": 128,
            **body,
        }


_REQUIRED: dict[str, tuple[str, type]] = {
    "vocab_size": ("vocab_size", int),
    "hidden_size": ("hidden_size", int),
    PATTERN_KEY: ("layer_pattern", str),
    "num_attention_heads": ("num_attention_heads", int),
    "num_key_value_heads": ("num_key_value_heads", int),
    "head_dim": ("head_dim", int),
    "mamba_num_heads": ("mamba_num_heads", int),
    "mamba_head_dim": ("mamba_head_dim", int),
    "n_groups": ("n_groups", int),
    "ssm_state_size": ("ssm_state_size", int),
    "conv_kernel": ("conv_kernel", int),
    "n_routed_experts": ("n_routed_experts", int),
    "num_experts_per_tok": ("num_experts_per_tok", int),
    "moe_intermediate_size": ("moe_intermediate_size", int),
    "moe_shared_expert_intermediate_size": ("moe_shared_expert_intermediate_size", int),
    "intermediate_size": ("intermediate_size", int),
    "n_group": ("n_group", int),
    "topk_group": ("topk_group", int),
    "norm_topk_prob": ("norm_topk_prob", bool),
    "routed_scaling_factor": ("routed_scaling_factor", float),
    "layer_norm_epsilon": ("layer_norm_epsilon", float),
    "max_position_embeddings": ("max_position_embeddings", int),
}
_OPTIONAL: dict[str, type] = {
    "use_bias": bool,
    "use_conv_bias": bool,
    "attention_bias": bool,
    "mlp_bias": bool,
    "bos_token_id": int,
    "eos_token_id": int,
    "pad_token_id": int,
}
# Fields that are no keys of config.json.
_NOT_KEYS = frozenset(("mask_token_id", "quantized_experts"))
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_POSITIVE = [
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "mamba_num_heads",
    "mamba_head_dim",
    "n_groups",
    "ssm_state_size",
    "conv_kernel",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "intermediate_size",
    "n_group",
    "max_position_embeddings",
]
_DIVISIBLE = (
    ("num_attention_heads", "num_key_value_heads"),
    ("mamba_num_heads", "n_groups"),
    ("n_routed_experts", "n_group"),
)


def _typed(raw: dict[str, Any], key: str, kind: type) -> Any:
    """The value of `key`, which has to be of type `kind`; an int is taken for a float."""
    if key not in raw:
        raise ConfigError(f"{key}: missing in config.json")
    value = raw[key]
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(f"{key}: got {value!r}, expected {kind.__name__}")
    return value
