"""What from_pretrained takes, refuses and never does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from twotower import TwoTower
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.errors import CheckpointError, ConfigError, InvalidRequestError
from twotower.transformers import NemotronHTwoTowerForCausalLM

IDS = torch.tensor([[4, 5, 6]])


def loaded(folder: Path, **arguments: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, **arguments)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, str]]:
    """Devices and dtype of every reading of weights."""
    seen: list[tuple[Any, str]] = []
    read = TwoTower.from_pretrained.__func__  # type: ignore[attr-defined]

    def noted(cls: Any, path: Any, device: Any, dtype: str) -> TwoTower:
        seen.append((tuple(map(str, device)), dtype))
        return read(cls, path, "cpu", dtype)  # type: ignore[no-any-return]

    monkeypatch.setattr(TwoTower, "from_pretrained", classmethod(noted))
    return seen


def test_the_model_is_one_of_transformers(auto_model: Any) -> None:
    assert type(auto_model) is NemotronHTwoTowerForCausalLM
    assert isinstance(auto_model, PreTrainedModel)
    assert auto_model.can_generate()
    assert auto_model.eval() is auto_model
    assert auto_model.training is False
    assert auto_model.device == torch.device("cpu")
    assert auto_model.dtype == auto_model.config.dtype == torch.float32
    auto_model.tie_weights()


def test_code_of_a_checkpoint_is_never_run(tiny_a: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_a, tmp_path / "model")
    for name in ("configuration_nemotron_h.py", "modeling_nemotron_twotower.py"):
        (tmp_path / "model" / name).write_text("raise RuntimeError('the code was run')")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}
    for trusted in (None, False, True):
        model = loaded(tmp_path / "model", trust_remote_code=trusted, dtype="float32")
        assert type(model) is NemotronHTwoTowerForCausalLM


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({}, torch.bfloat16),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"dtype": "float32"}, torch.float32),
        ({"torch_dtype": torch.bfloat16}, torch.bfloat16),
        ({"torch_dtype": "float32"}, torch.float32),
    ],
)
def test_dtypes(tiny_a: Path, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    model = loaded(tiny_a, **arguments)
    assert model.dtype == model.config.dtype == dtype
    assert model(IDS).logits.dtype == dtype


def test_auto_is_the_dtype_of_the_weights(tiny_b: Path) -> None:
    assert loaded(tiny_b).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, "float16", torch.int8])
def test_other_dtypes_are_refused(tiny_a: Path, dtype: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected one of float32, bfloat16 or 'auto'"):
        loaded(tiny_a, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_map": "auto"}, "device_map: got 'auto', expected a device"),
        ({"device_map": {"lm_head": 0}}, "device_map: got {'lm_head': 0}, expected a device"),
        ({"variant": "fp16"}, "variant: got 'fp16', expected None"),
        ({"subfolder": "part"}, "subfolder: got 'part'"),
        ({"load_in_8bit": True}, "load_in_8bit: got True, expected no such argument"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: got"),
        ({"attn_implementation": "flash_attention_2"}, "attn_implementation: got"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tiny_a: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        NemotronHTwoTowerForCausalLM.from_pretrained(tiny_a, **arguments)


def test_a_config_that_shapes_another_model_is_refused(tiny_a: Path) -> None:
    """Also where the Auto class has taken an argument for a key of the config."""
    with pytest.raises(ConfigError, match=r"^num_experts_per_tok: got 1, expected 3 as in"):
        loaded(tiny_a, num_experts_per_tok=1)
    config = AutoConfig.from_pretrained(tiny_a)
    config.hidden_size = 8
    with pytest.raises(ConfigError, match=r"^hidden_size: got 8, expected 56 as in"):
        loaded(tiny_a, config=config)


def test_a_broken_checkpoint_is_refused_before_it_is_read(tiny_a: Path, tmp_path: Path) -> None:
    shutil.copy(tiny_a / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"^model.safetensors: missing from the checkpoint"):
        loaded(tmp_path)
    with pytest.raises(CheckpointError, match="not a folder, nor a hub id"):
        NemotronHTwoTowerForCausalLM.from_pretrained(tmp_path / "absent")


def test_a_generation_config_in_the_folder_cuts_nothing(tiny_a: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_a, tmp_path / "model")
    settings = {"max_length": 6, "max_new_tokens": 1, "do_sample": True, "num_beams": 4}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    model = loaded(tmp_path / "model", dtype="float32")
    want = loaded(tiny_a, dtype="float32").generate(IDS, max_new_tokens=9, eos_token_id=None)
    assert model.generate(IDS, max_new_tokens=9, eos_token_id=None).equal(want)
    assert model.generate(IDS, eos_token_id=None).shape == (1, 23)


def test_a_folder_that_does_not_say_its_architecture(tiny_a: Path, tmp_path: Path) -> None:
    """The Auto classes cannot know it; the class does."""
    shutil.copytree(tiny_a, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    model = NemotronHTwoTowerForCausalLM.from_pretrained(tmp_path / "model")
    assert model.generate_ar(IDS, max_new_tokens=2).shape == (1, 5)


def test_quantized_experts(tiny_a: Path, tmp_path: Path) -> None:
    quantize_checkpoint(tiny_a, tmp_path / "fp8")
    model = loaded(tmp_path / "fp8", dtype="float32")
    (alone,) = TwoTower.from_pretrained(tmp_path / "fp8").generate(
        [[4, 5, 6]], max_tokens=16, commit_rule="released"
    )
    out = model.generate_mask_diffusion(IDS, max_new_tokens=16, confidence_threshold=0.8)
    assert out[0, 3:].tolist() == alone.token_ids
    stored = model.config.quantization_config
    assert NemotronHTwoTowerForCausalLM.from_pretrained(
        tmp_path / "fp8", quantization_config=stored
    )
    with pytest.raises(InvalidRequestError, match=r"^quantization_config: got"):
        NemotronHTwoTowerForCausalLM.from_pretrained(
            tmp_path / "fp8", quantization_config={"quant_method": "gptq"}
        )


def test_an_adapter_in_the_folder_is_refused(tiny_a: Path) -> None:
    found = {"_adapter_model_path": "somewhere"}
    with pytest.raises(InvalidRequestError, match=r"^adapter: got 'somewhere'"):
        NemotronHTwoTowerForCausalLM.from_pretrained(tiny_a, adapter_kwargs=found)


def test_a_model_without_a_checkpoint_is_refused(tiny_a: Path) -> None:
    with pytest.raises(InvalidRequestError, match="weights come from a checkpoint"):
        AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_a))


def test_weights_are_read_once_and_where_the_towers_are_placed(
    tiny_a: Path, reads: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    model = loaded(tiny_a, dtype="float32")
    assert reads == []
    assert model.place_towers_on_devices("cuda:0", torch.device("cuda:1")) is model
    assert model.device == torch.device("cuda:0")
    assert reads == []
    model(IDS)
    model.generate_ar(IDS, max_new_tokens=2)
    assert reads == [(("cuda:0", "cuda:1"), "float32")]
    model.place_towers_on_devices("cuda:0", "cuda:1").to(torch.float32)
    assert len(reads) == 1
    assert model.to(1) is model
    assert reads[1:] == [(("cuda:1", "cuda:1"), "float32")]
    model.cpu().bfloat16()
    assert reads[2:] == [(("cpu", "cpu"), "float32"), (("cpu", "cpu"), "bfloat16")]
    assert model.dtype == model.config.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("device_map", "devices"),
    [
        ("cpu", ("cpu", "cpu")),
        ({"": "cuda:1"}, ("cuda:1", "cuda:1")),
        (1, ("cuda:1", "cuda:1")),
        ({"context_tower": 0, "denoiser_tower": "cpu"}, ("cuda:0", "cpu")),
    ],
)
def test_a_device_map_is_read_at_once(
    tiny_a: Path, reads: list[Any], monkeypatch: pytest.MonkeyPatch, device_map: Any, devices: Any
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    NemotronHTwoTowerForCausalLM.from_pretrained(tiny_a, device_map=device_map)
    assert reads == [(devices, "bfloat16")]


@pytest.mark.parametrize("device", ["cuda:7", 7, "mps", True, None])
def test_a_device_that_is_not_here(auto_model: Any, device: Any) -> None:
    with pytest.raises(ConfigError, match=r"^device: got"):
        auto_model.place_towers_on_devices("cpu", device)
    assert auto_model(IDS).logits.shape[:2] == (1, 3)


def test_the_weights_are_counted_though_they_are_no_parameters(shipped: Any) -> None:
    card = json.loads((resolve_checkpoint(None) / "training.json").read_text(encoding="utf-8"))
    assert shipped.num_parameters() == 9_758_400, card
    embeddings = 2 * 2048 * 256
    assert shipped.num_parameters(exclude_embeddings=True) == 9_758_400 - embeddings
    assert shipped.num_parameters(only_trainable=True) == 0


def test_what_the_model_is_not_for(auto_model: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"^mode: got True, expected False: both towers"):
        auto_model.train()
    with pytest.raises(InvalidRequestError, match=r"^save_directory: got .*, expected a copy of"):
        auto_model.save_pretrained(tmp_path)
    with pytest.raises(InvalidRequestError, match=r"^dtype: got torch.float16"):
        auto_model.half()


def test_the_hub_s_options_reach_the_hub(monkeypatch: pytest.MonkeyPatch, tiny_a: Path) -> None:
    asked: dict[str, Any] = {}

    def download(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(tiny_a)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = {"revision": "v2", "cache_dir": "/tmp/x", "local_files_only": True, "token": None}
    NemotronHTwoTowerForCausalLM.from_pretrained("owner/name", **options)
    del asked["allow_patterns"]
    assert asked == {
        "hub_id": "owner/name",
        "revision": "v2",
        "cache_dir": "/tmp/x",
        "local_files_only": True,
    }
