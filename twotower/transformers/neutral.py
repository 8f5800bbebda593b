"""Arguments of transformers' calls that this model does not have.

Such an argument may be given with a value that asks for nothing; any other value is refused by the
argument's name, so that none is ignored silently.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from twotower.towers.errors import InvalidRequestError

Neutral = Mapping[str, tuple[object, ...]]
ANY: tuple[object, ...] = ()
_OFF = (None, False)

# ANY: says how something is loaded or computed, and never what.
FROM_PRETRAINED: Neutral = {
    "_commit_hash": ANY,
    "_from_auto": ANY,
    "_from_pipeline": ANY,
    # Where to look for an adapter, not one that is there: see `refuse_adapter`.
    "adapter_kwargs": ANY,
    "attn_implementation": (None, "eager", "sdpa"),
    "code_revision": ANY,
    "gguf_file": (None,),
    "ignore_mismatched_sizes": _OFF,
    "low_cpu_mem_usage": ANY,
    "max_memory": (None,),
    "offload_folder": ANY,
    "output_loading_info": _OFF,
    "proxies": (None,),
    "state_dict": (None,),
    "subfolder": (None, ""),
    "tp_plan": (None,),
    # There is no such code to trust: see the package's first lines.
    "trust_remote_code": ANY,
    "use_safetensors": (None, True),
    "variant": (None,),
    "weights_only": (None, True),
}
FORWARD: Neutral = {
    "cache_position": (None,),
    "inputs_embeds": (None,),
    "output_attentions": _OFF,
    "output_hidden_states": _OFF,
    "past_key_values": (None,),
    "position_ids": (None,),
    "return_dict": (None, True),
    "token_type_ids": (None,),
    "use_cache": ANY,
}
GENERATE: Neutral = {
    "assistant_model": (None,),
    "bad_words_ids": (None, []),
    "begin_suppress_tokens": (None, []),
    "bos_token_id": ANY,
    "cache_config": (None,),
    "cache_implementation": (None,),
    "compile_config": (None,),
    "constraints": (None,),
    "custom_generate": (None,),
    "decoder_start_token_id": (None,),
    "disable_compile": ANY,
    "diversity_penalty": (None, 0.0),
    "early_stopping": _OFF,
    "encoder_no_repeat_ngram_size": (None, 0),
    "encoder_repetition_penalty": (None, 1.0),
    "epsilon_cutoff": (None, 0.0),
    "eta_cutoff": (None, 0.0),
    "exponential_decay_length_penalty": (None,),
    "force_words_ids": (None,),
    "forced_bos_token_id": (None,),
    "forced_eos_token_id": (None,),
    "guidance_scale": (None, 1.0),
    "inputs_embeds": (None,),
    "length_penalty": (None, 1.0),
    "low_memory": _OFF,
    "logits_processor": (None, []),
    "max_cache_len": (None,),
    "max_time": (None,),
    "negative_prompt_attention_mask": (None,),
    "negative_prompt_ids": (None,),
    "no_repeat_ngram_size": (None, 0),
    "num_beam_groups": (None, 1),
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "output_attentions": _OFF,
    "output_hidden_states": _OFF,
    "output_logits": _OFF,
    "output_scores": _OFF,
    "past_key_values": (None,),
    "penalty_alpha": (None,),
    "position_ids": (None,),
    "prefix_allowed_tokens_fn": (None,),
    "prompt_lookup_num_tokens": (None,),
    "remove_invalid_values": ANY,
    "renormalize_logits": ANY,
    "repetition_penalty": (None, 1.0),
    "return_dict_in_generate": _OFF,
    "sequence_bias": (None, {}),
    "suppress_tokens": (None, []),
    "synced_gpus": _OFF,
    "token_healing": _OFF,
    "token_type_ids": (None,),
    "top_h": (None,),
    "typical_p": (None, 1.0),
    "use_cache": ANY,
    "watermarking_config": (None,),
}


def check_neutral(given: Mapping[str, Any], neutral: Neutral) -> None:
    """Raises InvalidRequestError for the first argument with an effect that there is not, and for
    one that is unknown."""
    for name, value in given.items():
        if name not in neutral:
            raise InvalidRequestError(name, value, "no such argument")
        allowed = neutral[name]
        if allowed != ANY and not any(_same(value, other) for other in allowed):
            limit = " or ".join(repr(other) for other in allowed)
            raise InvalidRequestError(name, value, f"{limit}: this model has nothing else of it")


def refuse_adapter(given: Mapping[str, Any]) -> None:
    """Raises InvalidRequestError if the Auto class has found an adapter (LoRA and the like), which
    would change the weights."""
    path = (given.get("adapter_kwargs") or {}).get("_adapter_model_path")
    if path is not None:
        raise InvalidRequestError("adapter", str(path), "a checkpoint without an adapter")


def _same(value: object, other: object) -> bool:
    """Equal, without asking tensors and arrays, whose equality is no single answer."""
    if isinstance(other, list | dict):
        return hasattr(value, "__len__") and isinstance(value, list | dict) and not value
    if other is None or isinstance(other, bool):
        return value is other
    return isinstance(value, int | float | str) and value == other
