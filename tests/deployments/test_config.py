"""The operator's settings and what they make of a pair."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml

from twotower.deployments.access.errors import RateLimitError, UnauthenticatedError
from twotower.deployments.access.keys import new_key
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.autoscaling import PairAutoscaling
from twotower.deployments.pair.overload import OverloadDial
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import CheckpointError, ConfigError

KEY = {"name": "ann", "sha256": "ab" * 32}
TINY = Path(__file__).parents[1] / "golden" / "tiny_a"


def test_file_and_options(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    path.write_text("model: somewhere\nmax_num_seqs: 4\nautoscaling: {max_pairs: 3}\n")
    config = ServiceConfig.from_file(path, max_num_seqs=9, dtype=None)
    assert (config.model, config.max_num_seqs, config.dtype) == ("somewhere", 9, "float32")
    assert config.autoscaling == PairAutoscaling(max_pairs=3)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"device": "tpu"}, "device"),
        ({"grpc_port": 70000}, "grpc_port"),
        ({"ingress": "nobody"}, "ingress: Input should be 'proxy' or 'direct'"),
        (
            {"ingress": "direct", "num_routers": 3, "grpc_port": 9000, "http_port": 9002},
            "grpc_port and http_port: got 9000 and 9002, expected 3 apart",
        ),
        (
            {"ingress": "direct", "num_routers": 3, "grpc_port": 65534},
            "num_routers: the last has port 65536, expected at most 65535",
        ),
        ({"router_resource": "two words"}, "router_resource"),
        ({"dtype": "float16"}, "dtype: Input should be 'float32' or 'bfloat16', got 'float16'"),
        ({"expert_products": "int8"}, "expert_products: Input should be 'widened' or 'fp8'"),
        ({"memory_fraction": 1.5}, "memory_fraction"),
        ({"transport": "carrier pigeon"}, "transport"),
        ({"prefix_cache_mib": -1}, "prefix_cache_mib"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"threads_per_tower": 2}, "threads_per_tower: the name of this setting is num_threads"),
        ({"transport": "nccl"}, "transport: got 'nccl' for device 'cpu', expected CUDA"),
        (
            {"denoisers_per_context": 2, "placement": "colocated"},
            "denoisers_per_context: got 2, expected 1 with placement 'colocated'",
        ),
        ({"num_pairs": 2, "autoscaling": {"max_pairs": 3}}, "num_pairs"),
        ({"autoscaling": {}}, r"autoscaling\.max_pairs"),
        ({"autoscaling": {"max_pairs": 0}}, r"autoscaling\.max_pairs"),
        (
            {"autoscaling": {"min_pairs": 4, "max_pairs": 3}},
            "max_pairs: got 3, expected at least 4",
        ),
        ({"autoscaling": {"max_pairs": 3, "hysteresis": 1}}, r"autoscaling\.hysteresis"),
        ({"autoscaling": {"max_pairs": 3, "zero_after_s": math.inf}}, "zero_after_s: .*got inf"),
        ({"autoscaling": {"max_pairs": 3, "metrics_interval_s": 0.1}}, "metrics_interval_s"),
        ({"autoscaling": {"max_pairs": 3, "max_replicas": 3}}, r"autoscaling\.max_replicas"),
        ({"autoscaling": "auto"}, "autoscaling"),
        ({"ease_from": 5, "ease_full": 5}, "ease_from: got 5, expected 0 to less than ease_full"),
        ({"ease_from": -1}, "ease_from"),
        ({"pack": "domain"}, "pack: got 'domain' without label_selector"),
        ({"pack": "anywhere"}, "pack"),
        (
            {"pack": "domain", "label_selector": {"d": "in(a,b)"}},
            r"label_selector\.d: got 'in\(a,b\)', expected one value",
        ),
        ({"max_queued_requests": 4, "ease_from": 5}, "ease_from: got 5, expected at most max_que"),
        ({"max_queued_requests": 4, "ease_full": 5}, "ease_full: got 5, expected at most max_que"),
        ({"label_selector": "a=b"}, "label_selector"),
        ({"http_host": ""}, "http_host"),
        ({"http_host": "a b"}, "http_host"),
        ({"cors_origins": ["example.com"]}, r"cors_origins: .*got 'example.com', expected https:"),
        ({"cors_origins": ["https://a/path"]}, "cors_origins"),
        ({"cors_origins": ["*"]}, r"cors_origins: got '\*' without api_keys"),
        ({"api_keys": [KEY], "allow_anonymous": True}, "allow_anonymous and api_keys exclude"),
        ({"api_keys": [KEY, KEY]}, "api_keys: .*name: got 'ann' 2 times"),
        ({"api_keys": [KEY, {**KEY, "name": "bob"}]}, "api_keys: .*sha256: got one for 'ann' and"),
        ({"channel_tls": True, "transport": "gloo"}, "channel_tls: got true with transport 'gloo'"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        ServiceConfig.from_settings(settings)


@pytest.mark.parametrize(
    "keys",
    [
        [{"name": "a", "sha256": "tt-secret"}],
        [{"name": "a", "key": "tt-secret"}],
        ["tt-secret"],
        "tt-secret",
        [KEY, {**KEY, "name": "bob"}],
    ],
)
def test_nothing_of_a_key_is_in_an_error(keys: object) -> None:
    for others in ({}, {"grpc_port": 1, "http_port": 1}):
        with pytest.raises(ConfigError) as caught:
            ServiceConfig.from_settings({"api_keys": keys, **others})
        assert "secret" not in str(caught.value)
        assert "abab" not in str(caught.value)


def test_hashes_are_in_no_text_of_the_settings() -> None:
    config = ServiceConfig.from_settings({"api_keys": [KEY], "cors_origins": ["*"]})
    assert "abab" not in repr(config)
    with pytest.raises(ConfigError, match="grpc_port and http_port") as caught:
        ServiceConfig.from_settings({"api_keys": [KEY], "grpc_port": 1, "http_port": 1})
    assert "abab" not in str(caught.value)


def test_access_follows_the_settings() -> None:
    plain, sha256 = new_key()
    settings = {"api_keys": [{"name": "ann", "sha256": sha256, "max_concurrent": 4}]}
    access = ServiceConfig.from_settings({**settings, "num_routers": 2}).access()
    limits = access.caller(f"Bearer {plain}", None).limits
    limits.admit()
    limits.admit()
    with pytest.raises(RateLimitError, match="expected at most 2"):
        limits.admit()
    with pytest.raises(UnauthenticatedError):
        ServiceConfig().access().caller(None, "10.0.0.1")
    anyone = ServiceConfig(allow_anonymous=True).access()
    assert anyone.caller(None, "10.0.0.1").name == "anonymous"


def test_origins_that_may_call() -> None:
    origins = ["https://a.example", "http://127.0.0.1:8000", "http://[::1]:8000"]
    assert ServiceConfig.from_settings({"cors_origins": origins}).cors_origins == origins


def test_scaling_follows_the_settings(tmp_path: Path) -> None:
    assert ServiceConfig().scaling() is None
    path = tmp_path / "service.yaml"
    settings = {
        "min_pairs": 0,
        "max_pairs": 9,
        "max_pass_s": 0.25,
        "smoothing_s": 3.0,
        "scale_down_after_s": 60.0,
        "hysteresis": 0.2,
        "zero_after_s": 120.0,
        "metrics_interval_s": 10.0,
        "cold_start_queue": 77,
    }
    path.write_text(yaml.safe_dump({"max_num_seqs": 40, "autoscaling": settings}))
    config = ServiceConfig.from_file(path)
    # Three quarters of a pair's rows, and signals count for five intervals.
    found = config.scaling()
    assert found == PairAutoscaling(**settings, target_rows_per_pair=30.0)
    assert found.stale_after_s == 50.0
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(config.model_dump()))
    assert ServiceConfig.from_file(again) == config
    given = ServiceConfig(autoscaling=PairAutoscaling(max_pairs=2, target_rows_per_pair=5))
    scaling = given.scaling()
    assert scaling is not None
    assert scaling.target_rows_per_pair == 5
    # One row at a time is a target too.
    one = ServiceConfig(max_num_seqs=1, autoscaling=PairAutoscaling(max_pairs=2)).scaling()
    assert one is not None
    assert one.target_rows_per_pair == 1


@pytest.mark.parametrize(
    ("settings", "dial"),
    [
        ({}, (8, 32)),
        ({"max_num_seqs": 32, "max_queued_requests": 40}, (8, 20)),
        ({"max_num_seqs": 32, "max_queued_requests": 8}, (3, 4)),
        ({"max_num_seqs": 64, "max_queued_requests": -1}, (16, 64)),
        ({"max_num_seqs": 1, "max_queued_requests": 0}, (0, 1)),
        ({"ease_from": 100}, (100, 101)),
        ({"ease_full": 4}, (3, 4)),
        ({"ease_from": 2, "ease_full": 7}, (2, 7)),
    ],
)
def test_the_dial_follows_rows_and_queue(settings: dict[str, int], dial: tuple[int, int]) -> None:
    assert ServiceConfig(**settings).dial() == OverloadDial(*dial)  # type: ignore[arg-type]


def test_topology_follows_the_device() -> None:
    cpu = ServiceConfig(model=str(TINY)).topology()
    assert (cpu.gpus_per_tower, cpu.cpus_per_tower) == (0.0, 0.4)
    assert Path(cpu.model_path).is_absolute()
    assert ServiceConfig(model=str(TINY), device="cuda").topology().gpus_per_tower == 1.0
    half = ServiceConfig(model=str(TINY), device="cuda", gpus_per_tower=0.5)
    assert half.topology().gpus_per_tower == 0.5


def test_the_mode_of_the_towers_follows_the_setting() -> None:
    for given, want in (({}, False), ({"deterministic": True}, True)):
        config = ServiceConfig.from_settings({"model": str(TINY), **given})
        assert config.topology().deterministic is want


def test_engines_follow_the_settings() -> None:
    settings = {
        "max_num_seqs": 5,
        "max_context": 300,
        "memory_fraction": 0.1,
        "max_queued_requests": 7,
        "max_num_batched_tokens": 128,
        "max_prefill_tokens": 32,
        "prefix_cache_mib": 3,
    }
    options = ServiceConfig(model=str(TINY), **settings).topology().engine
    assert options == EngineOptions(**settings)
    unlimited = ServiceConfig(model=str(TINY), max_queued_requests=-1).topology()
    assert unlimited.engine.max_queued_requests is None


def test_a_faulty_checkpoint_is_named_before_anything_starts(tmp_path: Path) -> None:
    shutil.copy(TINY / "config.json", tmp_path)
    whole = (TINY / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        ServiceConfig(model=str(tmp_path)).checkpoint()


def test_the_longest_message_has_room_for_every_context(tmp_path: Path) -> None:
    # A token of the shipped model is at most 41 bytes of text, an id at most 5 of a message.
    shipped = ServiceConfig(max_context=1000)
    assert shipped.message_bytes() == 41_000 + 5_000 + (64 << 10)
    assert ServiceConfig(max_context=1000, max_message_bytes=70_000).message_bytes() == 70_000
    assert ServiceConfig(max_context=1 << 30).message_bytes() == (1 << 31) - 1
    # Without a tokenizer, or with one of which nothing is known.
    assert ServiceConfig(model=str(TINY), max_context=1000).message_bytes() == 4 << 20
    assert ServiceConfig(model=str(TINY), max_context=1 << 20).message_bytes() > 10 << 20
    shutil.copy(TINY / "config.json", tmp_path)
    words = {"model": {"type": "WordLevel", "vocab": {"a": 0}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    assert ServiceConfig(model=str(tmp_path)).message_bytes() == 4 << 20


def test_the_longest_request_is_no_longer_than_that() -> None:
    context = 300
    request = pb.GenerateRequest(
        request_id="r" * 128,
        text="a" * 41 * context,
        generated_token_ids=[2047] * context,
        sampling_params=pb.SamplingParams(
            stop=["🌍" * 256] * 16,
            mode="mask_diffusion",
            seed=2**63 - 1,
            max_tokens=2**31 - 1,
            logit_bias={2**31 - 1 - token: 99.5 for token in range(1024)},
        ),
    )
    limit = ServiceConfig(max_context=context).message_bytes()
    assert request.ByteSize() <= limit
    request.tokens.ids.extend([2**31 - 1] * context)
    request.ClearField("generated_token_ids")
    request.generated_token_ids.extend([2**31 - 1] * context)
    assert request.ByteSize() <= limit


@pytest.mark.parametrize("value", [0, -1, (64 << 10) - 1, 1 << 31])
def test_a_message_has_a_sensible_limit(value: int) -> None:
    with pytest.raises(ConfigError, match=f"max_message_bytes: .*, got {value}"):
        ServiceConfig.from_settings({"max_message_bytes": value})


def test_experts_that_are_not_in_8_bits_refuse_products_in_8_bits(tmp_path: Path) -> None:
    """Before any process is started."""
    assert ServiceConfig(model=str(TINY)).topology().expert_products == "widened"
    config = ServiceConfig(model=str(TINY), expert_products="fp8")
    with pytest.raises(ConfigError, match="expert_products: got 'fp8', expected 'widened': the"):
        config.checkpoint()
    quantize_checkpoint(TINY, tmp_path / "8_bits")
    config = ServiceConfig(model=str(tmp_path / "8_bits"), expert_products="fp8")
    assert config.checkpoint().config.quantized_experts
    assert config.topology().expert_products == "fp8"
