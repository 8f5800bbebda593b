"""Keys of a config.json other than the model's shapes, and other spellings of the shapes.

The released file and those that transformers 4.4x to 5.x write of it differ: version 5 tags numbers
that JSON lacks, spells the layers out, and adds further keys.
"""

from __future__ import annotations

import math
from typing import Any

from twotower.towers.errors import ConfigError

MAMBA, ATTENTION, MOE, MLP = "M", "*", "E", "-"
PATTERN_KEY = "hybrid_override_pattern"
_LAYER_LISTS = ("layers_block_type", "layer_types")
_LAYER_NAMES = {
    "linear_attention": MAMBA,
    "mamba": MAMBA,
    "full_attention": ATTENTION,
    "attention": ATTENTION,
    "moe": MOE,
    "mlp": MLP,
}
_FLOAT_TAG = "__float__"
_TAGGED_FLOATS = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}

# Keys whose other values would change the computation in ways that no kernel here covers.
_FIXED: dict[str, tuple[object, ...]] = {
    "model_type": ("nemotron_h",),
    "architectures": (["NemotronHTwoTowerForCausalLM"],),
    "mamba_hidden_act": ("silu",),
    "mlp_hidden_act": ("relu2",),
    "tie_word_embeddings": (False,),
    "residual_in_fp32": (False,),
    "n_shared_experts": (1,),
    "moe_latent_size": (None,),
    "num_nextn_predict_layers": (0, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    # Defaults of transformers' generate that would change the output; a request has no such field.
    "bad_words_ids": (None,),
    "begin_suppress_tokens": (None,),
    "encoder_no_repeat_ngram_size": (0, None),
    "exponential_decay_length_penalty": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "no_repeat_ngram_size": (0, None),
    "prefix": (None, ""),
    "repetition_penalty": (1.0, None),
    "suppress_tokens": (None,),
}
# Keys of released files without any effect on inference: training and initialisation, other code
# paths, position encodings that the model does not have. `chunk_size` is among them: the scan's
# result does not depend on the cuts of the sequence.
_INERT = {
    "attention_dropout",
    "auto_map",
    "chunk_size",
    "dtype",
    "expand",
    "hidden_dropout",
    "initializer_range",
    "mamba_proj_bias",
    "mamba_ssm_cache_dtype",
    "moe_shared_expert_overlap",
    "mtp_hybrid_override_pattern",
    "mtp_layers_block_type",
    "norm_eps",
    "num_logits_to_keep",
    "output_router_logits",
    "partial_rotary_factor",
    "rescale_prenorm_residual",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "sliding_window",
    "time_step_floor",
    "time_step_max",
    "time_step_min",
    "torch_dtype",
    "use_cache",
    "use_mamba_kernels",
}
# Keys that transformers adds to every model's config: outputs of its classes, labels and
# bookkeeping, and defaults of its generate, which a request sets or which only beam search reads.
_INERT_IN_TRANSFORMERS = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "finetuning_task",
    "id2label",
    "is_decoder",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "problem_type",
    "remove_invalid_values",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers_version",
    "typical_p",
    "use_bfloat16",
}
_CHECKED_HERE = {"time_step_limit", "num_hidden_layers", "num_local_experts", *_LAYER_LISTS}


def plain_keys(raw: dict[str, Any], shaping: set[str]) -> dict[str, Any]:
    """The config `raw` with every number plain and the layers as a pattern.

    `shaping` are the keys that the caller reads. Raises ConfigError, with the key's name, for any
    other key or value that may change the model.
    """
    unknown = sorted(
        set(raw) - shaping - {*_FIXED} - _INERT - _INERT_IN_TRANSFORMERS - _CHECKED_HERE
    )
    if unknown:
        raise ConfigError(f"{unknown[0]}: unknown key in config.json; it may change the model")
    plain = {key: _untagged(value) for key, value in raw.items()}
    for key, allowed in _FIXED.items():
        if key in plain and plain[key] not in allowed:
            raise ConfigError(f"{key}: got {plain[key]!r}, expected one of {list(allowed)}")
    _check_time_step_limit(plain.get("time_step_limit"))
    for key in _LAYER_LISTS:
        if plain.get(key) is not None:
            _take_layers(plain, key)
    _check_same(plain, "num_local_experts", "n_routed_experts", plain.get("n_routed_experts"))
    pattern = plain.get(PATTERN_KEY)
    if isinstance(pattern, str):
        _check_same(plain, "num_hidden_layers", f"the length of {PATTERN_KEY}", len(pattern))
    return plain


def _untagged(value: Any) -> Any:
    """`value` with plain numbers for those that transformers 5 writes as
    `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        tag = value.get(_FLOAT_TAG)
        if len(value) == 1 and isinstance(tag, str) and tag in _TAGGED_FLOATS:
            return _TAGGED_FLOATS[tag]
        return {key: _untagged(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_untagged(inner) for inner in value]
    return value


def _take_layers(plain: dict[str, Any], key: str) -> None:
    """Sets the pattern from the list of layers under `key`; raises ConfigError for an unknown layer
    and for a pattern that differs."""
    layers = plain[key]
    expected = f"a list of {', '.join(_LAYER_NAMES)}"
    if not isinstance(layers, list):
        raise ConfigError(f"{key}: got {layers!r}, expected {expected}")
    for index, name in enumerate(layers):
        if not isinstance(name, str) or name not in _LAYER_NAMES:
            raise ConfigError(f"{key}[{index}]: got {name!r}, expected {expected}")
    pattern = "".join(_LAYER_NAMES[name] for name in layers)
    if plain.get(PATTERN_KEY) is None:
        plain[PATTERN_KEY] = pattern
    if plain[PATTERN_KEY] != pattern:
        raise ConfigError(
            f"{key}: got {pattern} in letters, expected those of {PATTERN_KEY}, "
            f"which is {plain[PATTERN_KEY]!r}"
        )


def _check_same(plain: dict[str, Any], key: str, what: str, expected: object) -> None:
    if plain.get(key) is not None and plain[key] != expected:
        raise ConfigError(f"{key}: got {plain[key]}, expected {expected}, {what}")


def _check_time_step_limit(limit: Any) -> None:
    """Raises ConfigError unless the limit is [0, inf]: a finite limit would clamp dt in scans."""
    if limit is not None and limit != [0.0, math.inf]:
        raise ConfigError(f"time_step_limit: got {limit}, expected [0.0, Infinity]")
