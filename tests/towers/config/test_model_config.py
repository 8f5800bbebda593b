"""config.json: keys that are read, keys that are ignored, and keys refused by name."""

from __future__ import annotations

import json
import math
import re
from copy import deepcopy
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from tests.support.random_model import SMALL, small_config
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.config.quantization_config import FP8_EXPERTS
from twotower.towers.errors import ConfigError

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "twotower" / "models" / "pystdlib"
FAULTS = ROOT / "tests" / "data" / "faults"
SHAPING = sorted(
    {field.name for field in fields(TwoTowerConfig) if field.name != "layer_pattern"}
    - {"use_bias", "use_conv_bias", "attention_bias", "mlp_bias", "mask_token_id"}
    - {"quantized_experts"}
    - {"bos_token_id", "eos_token_id", "pad_token_id"}
)


def changed(**changes: Any) -> dict[str, Any]:
    return SMALL.to_dict() | changes


def without(key: str) -> dict[str, Any]:
    raw = SMALL.to_dict()
    del raw[key]
    return raw


def test_released_keys(tiny_a: Path, tiny_b: Path) -> None:
    config = TwoTowerConfig.from_file(tiny_a / "config.json")
    assert config.layer_pattern == "MEM*EMEM*E"
    assert config.num_layers == 10
    assert config.d_inner == 6 * 12
    assert config.conv_dim == 136
    assert config.layers_of("*") == (3, 8)
    assert config.layers_of("-") == ()
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    other = TwoTowerConfig.from_file(tiny_b / "config.json")
    assert other.layers_of("-") == (1, 6)
    assert not other.use_conv_bias
    assert (other.n_group, other.topk_group, other.layer_norm_epsilon) == (3, 2, 5e-3)


def test_a_model_without_layers_is_none() -> None:
    with pytest.raises(ConfigError, match=r"^hybrid_override_pattern: got ''"):
        TwoTowerConfig.from_dict(changed(hybrid_override_pattern="", num_hidden_layers=0))


def test_what_is_written_is_read_back() -> None:
    config = small_config(eos_token_id=None, bos_token_id=None, use_conv_bias=False)
    assert TwoTowerConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("chunk_size", [1, 16, 128, None])
def test_chunk_size_changes_nothing(chunk_size: int | None) -> None:
    assert TwoTowerConfig.from_dict(changed(chunk_size=chunk_size)) == SMALL


@pytest.mark.parametrize("key", [*SHAPING, "hybrid_override_pattern"])
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: missing"):
        TwoTowerConfig.from_dict(without(key))


@pytest.mark.parametrize("key", [*SHAPING, "use_bias", "eos_token_id"])
@pytest.mark.parametrize("value", ["12x", [1]])
def test_a_value_of_the_wrong_type_is_named(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: got"):
        TwoTowerConfig.from_dict(changed(**{key: value}))


@pytest.mark.parametrize("key", ["hidden_size", "n_groups", "eos_token_id", "layer_norm_epsilon"])
def test_a_boolean_is_not_a_number(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: got True"):
        TwoTowerConfig.from_dict(changed(**{key: True}))


@pytest.mark.parametrize("key", ["sliding_window_size", "moe_latent_dim", "Hidden_size"])
def test_an_unknown_key_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{key}: unknown key"):
        TwoTowerConfig.from_dict(changed(**{key: 1}))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "mamba2"),
        ("architectures", ["NemotronHForCausalLM"]),
        ("mamba_hidden_act", "gelu"),
        ("mlp_hidden_act", "silu"),
        ("tie_word_embeddings", True),
        ("residual_in_fp32", True),
        ("n_shared_experts", 2),
        ("num_hidden_layers", 3),
        ("hybrid_override_pattern", "MXE*"),
        ("hybrid_override_pattern", 4),
        ("hidden_size", 0),
        ("conv_kernel", -1),
        ("num_key_value_heads", 3),
        ("n_groups", 3),
        ("n_group", 3),
        ("num_experts_per_tok", 5),
        ("topk_group", 0),
        ("topk_group", 3),
        ("vocab_size", 3),
        ("layer_norm_epsilon", 0.0),
        ("layer_norm_epsilon", math.nan),
        ("layer_norm_epsilon", -1e-5),
        ("routed_scaling_factor", math.inf),
        ("eos_token_id", 24),
        ("bos_token_id", -1),
    ],
)
def test_a_value_that_is_not_computed_is_refused(key: str, value: object) -> None:
    names = {"num_key_value_heads": "num_attention_heads", "n_groups": "mamba_num_heads"}
    named = {"n_group": "n_routed_experts"} | names
    with pytest.raises(ConfigError, match=rf"^({key}|{named.get(key, key)}): got .*expected"):
        TwoTowerConfig.from_dict(changed(**{key: value}))


@pytest.mark.parametrize("limit", [None, [0.0, math.inf], [0, math.inf]])
def test_an_open_time_step_limit_is_fine(limit: object) -> None:
    assert TwoTowerConfig.from_dict(changed(time_step_limit=limit)) == SMALL


@pytest.mark.parametrize(
    "limit", [[0.0, 0.1], [0.001, math.inf], [0.0], 5, "0,inf", [], {"min": 0}, [0.0, math.nan]]
)
def test_a_finite_time_step_limit_is_refused(limit: object) -> None:
    with pytest.raises(ConfigError, match=r"^time_step_limit: got .*expected \[0.0, Infinity\]"):
        TwoTowerConfig.from_dict(changed(time_step_limit=limit))


def test_bare_infinity_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(changed(time_step_limit=[0.0, math.inf])))
    assert "Infinity" in path.read_text()
    assert TwoTowerConfig.from_file(path) == SMALL


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"x"', "\x00", '{"a": }', "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"^config.json: "):
        TwoTowerConfig.from_file(path)


def test_bytes_that_are_no_text_and_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00{")
    with pytest.raises(ConfigError, match=r"^config.json: "):
        TwoTowerConfig.from_file(tmp_path / "config.json")
    with pytest.raises(ConfigError, match=r"^absent.json: not found"):
        TwoTowerConfig.from_file(tmp_path / "absent.json")
    with pytest.raises(ConfigError):
        TwoTowerConfig.from_file(tmp_path)


def test_experts_in_8_bits() -> None:
    quantized = small_config(quantized_experts=True)
    raw = json.loads(json.dumps(quantized.to_dict()))
    assert raw["quantization_config"]["format"] == "float-quantized"
    assert "quantized_experts" not in raw
    assert TwoTowerConfig.from_dict(raw) == quantized
    assert TwoTowerConfig.from_dict(raw | {"quantization_config": None}) == SMALL
    assert "quantization_config" not in SMALL.to_dict()


WEIGHTS = "config_groups.group_0.weights"


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("quant_method", "modelopt"),
        ("format", "nvfp4-pack-quantized"),
        (f"{WEIGHTS}.num_bits", 4),
        (f"{WEIGHTS}.strategy", "tensor"),
        (f"{WEIGHTS}.symmetric", 1),
        (f"{WEIGHTS}.group_size", 16),
        ("config_groups.group_0.input_activations", {"num_bits": 8}),
        ("config_groups.group_1", {}),
        ("config_groups", None),
        ("kv_cache_scheme", {"num_bits": 8}),
        ("ignore", ["lm_head"]),
    ],
)
def test_another_quantization_is_refused_by_its_first_key(path: str, value: object) -> None:
    scheme = deepcopy(FP8_EXPERTS)
    *folders, key = path.split(".")
    inner = scheme
    for folder in folders:
        inner = inner[folder]
    inner[key] = value
    named = rf"^quantization_config\.{path}: (got|unknown)"
    with pytest.raises(ConfigError, match=named):
        TwoTowerConfig.from_dict(changed(quantization_config=scheme))


@pytest.mark.parametrize("value", ["fp8", [], 8, {}])
def test_a_quantization_that_is_no_such_object_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^quantization_config(: got|\.quant_method: missing)"):
        TwoTowerConfig.from_dict(changed(quantization_config=value))


INF = {"__float__": "Infinity"}


@pytest.mark.parametrize("limit", [[0.0, INF], [0, INF], [{"__float__": "NaN"}], [0.0, 5.0]])
def test_infinity_as_transformers_5_tags_it(limit: list[Any]) -> None:
    if limit[-1] == INF:
        assert TwoTowerConfig.from_dict(changed(time_step_limit=limit)) == SMALL
        return
    with pytest.raises(ConfigError, match=r"^time_step_limit: got"):
        TwoTowerConfig.from_dict(changed(time_step_limit=limit))


@pytest.mark.parametrize("tag", ["Infinity", "-Infinity", "NaN", "inf", 1, None, ["Infinity"]])
def test_a_tag_where_no_infinity_may_be(tag: object) -> None:
    with pytest.raises(ConfigError, match=r"^routed_scaling_factor: got"):
        TwoTowerConfig.from_dict(changed(routed_scaling_factor={"__float__": tag}))


@pytest.mark.parametrize("name", ["tagged_infinity", "resaved_by_transformers"])
def test_files_that_transformers_5_has_written(name: str) -> None:
    shipped = TwoTowerConfig.from_file(SHIPPED / "config.json")
    assert TwoTowerConfig.from_file(FAULTS / name / "config.json") == shipped


@pytest.mark.parametrize("eos", [None, 2])
def test_saved_by_the_installed_transformers(tmp_path: Path, eos: int | None) -> None:
    """By its own class of the architecture, and by one that a checkpoint brings along."""
    from transformers import NemotronHConfig, PretrainedConfig

    class Own(PretrainedConfig):  # type: ignore[misc]
        model_type = "nemotron_h"

    config = small_config(eos_token_id=eos, layer_norm_epsilon=3e-5, use_conv_bias=False)
    released = config.to_dict() | {"time_step_limit": [0.0, math.inf], "torch_dtype": "bfloat16"}
    for kind in (NemotronHConfig, Own):
        kind(**released).save_pretrained(tmp_path)
        text = (tmp_path / "config.json").read_text()
        assert "__float__" in text
        assert '"dtype": "bfloat16"' in text
        assert TwoTowerConfig.from_file(tmp_path / "config.json") == config
        # And once more, from what was written.
        kind.from_pretrained(tmp_path).save_pretrained(tmp_path)
        assert TwoTowerConfig.from_file(tmp_path / "config.json") == config
        (tmp_path / "config.json").write_text(json.dumps(kind(**released).to_dict()))
        assert TwoTowerConfig.from_file(tmp_path / "config.json") == config


# What versions of transformers have written into every model's config, at its defaults.
OLDER: list[dict[str, Any]] = [
    {"torch_dtype": "bfloat16", "transformers_version": "4.48.3", "use_cache": True},
    {"dtype": "bfloat16", "transformers_version": "4.57.1", "auto_map": {"AutoConfig": "c.C"}},
    {"_name_or_path": "a/b", "_attn_implementation_autoset": True, "return_dict": True},
    {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "problem_type": None},
    {"rope_theta": 10000, "rope_scaling": None, "partial_rotary_factor": 1.0},
    {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "sliding_window": None},
    {"max_length": 20, "do_sample": False, "num_beams": 1, "temperature": 1.0, "top_k": 50},
    {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "bad_words_ids": None, "prefix": None},
    {"is_encoder_decoder": False, "is_decoder": False, "pruned_heads": {}, "torchscript": False},
    {"num_nextn_predict_layers": 0, "mtp_layers_block_type": ["full_attention", "moe"]},
    {"moe_latent_size": None, "moe_shared_expert_overlap": True, "num_local_experts": 4},
    {"layer_types": ["linear_attention", "full_attention", "moe", "mlp"]},
    {"layers_block_type": ["mamba", "attention", "moe", "mlp"], "num_hidden_layers": 4},
    {"layers_block_type": None, "num_hidden_layers": None},
]


@pytest.mark.parametrize("keys", OLDER, ids=lambda keys: next(iter(keys)))
def test_keys_that_change_nothing(keys: dict[str, Any]) -> None:
    assert TwoTowerConfig.from_dict(changed(**keys)) == SMALL


def test_layers_by_their_names() -> None:
    raw = without("hybrid_override_pattern")
    del raw["num_hidden_layers"]
    for key in ("layers_block_type", "layer_types"):
        for names in (["mamba", "attention", "moe", "mlp"], ["linear_attention", "full_attention"]):
            layers = [*names, "moe", "mamba"]
            pattern = TwoTowerConfig.from_dict(raw | {key: layers}).layer_pattern
            assert pattern == ("M*E-EM" if len(names) == 4 else "M*EM")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_block_type", ["mamba", "attention", "moe", "moe"]),
        ("layer_types", ["mamba"]),
        ("layer_types", []),
        ("layer_types", "M*E-"),
        ("layer_types[1]", ["mamba", "sliding_attention", "moe", "mlp"]),
        ("layer_types[0]", [None, "attention", "moe", "mlp"]),
        ("num_local_experts", 8),
        ("moe_latent_size", 64),
        ("num_nextn_predict_layers", 1),
        ("is_encoder_decoder", True),
        ("add_cross_attention", True),
        ("pruned_heads", {"0": [1]}),
        ("repetition_penalty", 1.2),
        ("no_repeat_ngram_size", 3),
        ("suppress_tokens", [5]),
        ("forced_eos_token_id", 2),
        ("bad_words_ids", [[7]]),
        ("prefix", "def "),
    ],
)
def test_keys_that_would_change_the_output(key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(key)}: got .*expected"):
        TwoTowerConfig.from_dict(changed(**{key.split("[")[0]: value}))
