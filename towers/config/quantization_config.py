"""The `quantization_config` of a checkpoint whose routed experts are stored in 8 bits.

The schema is that of compressed-tensors, which Hugging Face transformers and vLLM read: a linear
layer `X` is stored as `X.weight` [N, K] float8 e4m3 and `X.weight_scale` [N, 1], a scale per output
channel; activations are not quantized. Linear layers are quantized unless `ignore` names them, by a
full name or, after `re:`, by a pattern.
"""

from __future__ import annotations

from typing import Any

from twotower.towers.errors import ConfigError

KEY = "quantization_config"
FP8_EXPERTS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 8,
                "type": "float",
                "strategy": "channel",
                "symmetric": True,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
    "kv_cache_scheme": None,
    "ignore": [
        "lm_head",
        "context_lm_head",
        r"re:.*\.mixer\.(in_proj|out_proj|q_proj|k_proj|v_proj|o_proj|up_proj|down_proj|gate)$",
        r"re:.*\.mixer\.shared_experts\.(up_proj|down_proj)$",
        r"re:t_embedder\..*",
        r"re:t_block\..*",
    ],
}


def check_quantization_config(value: object) -> None:
    """Raises ConfigError, naming the first key that differs from `FP8_EXPERTS`."""
    _check_same(KEY, value, FP8_EXPERTS)


def _check_same(path: str, got: object, expected: object) -> None:
    if not isinstance(expected, dict):
        if got != expected or isinstance(got, bool) != isinstance(expected, bool):
            raise ConfigError(f"{path}: got {got!r}, expected {expected!r}")
        return
    if not isinstance(got, dict):
        raise ConfigError(f"{path}: got {got!r}, expected an object")
    for key in sorted(got.keys() - expected.keys()):
        raise ConfigError(f"{path}.{key}: unknown key; it may change the weights")
    for key, inner in expected.items():
        if key not in got:
            raise ConfigError(f"{path}.{key}: missing in config.json")
        _check_same(f"{path}.{key}", got[key], inner)
