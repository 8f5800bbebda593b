"""Quantized checkpoints: only routed experts change, wrong sources are refused, towers load."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits
from tests.support.random_model import (
    SMALL,
    random_tensors,
    small_config,
    write_checkpoint,
    write_shards,
)
from twotower.kernels import experts_triton, moe
from twotower.kernels.dispatch import Backend, force
from twotower.kernels.quantized import QuantizedExperts
from twotower.towers.checkpoint.checkpoint import Checkpoint, tensor_shapes
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.checkpoint.tensor_file import TensorFile
from twotower.towers.checkpoint.tower_loader import check_fp8_device, read_quantized
from twotower.towers.checkpoint.weights import (
    load_context_tower,
    load_denoiser_tower,
)
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.config.quantization_config import FP8_EXPERTS
from twotower.towers.errors import CheckpointError, ConfigError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import MoeWeights

EXPERT = re.compile(
    r"(context|denoiser)_tower\.layers\.2\.mixer\.experts\.\d\.(up|down)_proj\.weight"
)
ONE_EXPERT = "denoiser_tower.layers.2.mixer.experts.3.down_proj.weight"
Tensors = dict[str, Tensor]


def bf16_tensors() -> Tensors:
    """As released: bf16, but for the choice bias."""
    tensors = random_tensors(SMALL)
    return {
        name: value if "correction_bias" in name else value.bfloat16()
        for name, value in tensors.items()
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "source", tensors=bf16_tensors())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def read(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def raw_config(folder: Path) -> dict[str, Any]:
    raw = json.loads((folder / "config.json").read_text())
    assert isinstance(raw, dict)
    return raw


def nearest_e4m3(value: float) -> float:
    """The nearest number of 4 exponent and 3 mantissa bits, ties to even mantissas."""
    if value == 0.0:
        return 0.0
    exponent = max(math.floor(math.log2(abs(value))), -6)
    step = 2.0 ** (exponent - 3)
    return math.copysign(round(abs(value) / step) * step, value)


def test_only_routed_experts_change(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target)
    before, after = read(source), read(target)
    experts = {name for name in before if EXPERT.fullmatch(name)}
    assert len(experts) == 2 * 4 * 2
    assert after.keys() == before.keys() | {f"{name}_scale" for name in experts}
    for name, tensor in before.items():
        if name not in experts:
            assert after[name].dtype == tensor.dtype
            assert_same_bits(after[name].view(torch.uint8), tensor.view(torch.uint8), name)
            continue
        scale = after[f"{name}_scale"]
        assert (after[name].dtype, scale.dtype) == (torch.float8_e4m3fn, torch.float32)
        assert scale.shape == (len(tensor), 1)
        assert_same_bits(scale[:, 0], tensor.float().abs().amax(1) / 448.0, name)


def test_values_are_the_nearest_that_the_format_has(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target)
    before, after = read(source), read(target)
    scaled = before[ONE_EXPERT].float() / after[f"{ONE_EXPERT}_scale"]
    want = torch.tensor([[nearest_e4m3(value) for value in row] for row in scaled.tolist()])
    assert_same_bits(after[ONE_EXPERT].float(), want)


def test_the_report_is_what_the_files_say(source: Path, target: Path) -> None:
    told: list[tuple[int, int]] = []
    report = quantize_checkpoint(source, target, lambda *one: told.append(one))
    before, after = read(source), read(target)
    size = sum(tensor.nbytes for tensor in before.values())
    assert (told[-1], len(told)) == ((size, size), len(before))
    towers = [(layer.tower, layer.layer) for layer in report.layers]
    assert towers == [("context_tower", 2), ("denoiser_tower", 2)]
    for layer in report.layers:
        for side, got in (("up", layer.up), ("down", layer.down)):
            names = [
                f"{layer.tower}.layers.2.mixer.experts.{expert}.{side}_proj.weight"
                for expert in range(4)
            ]
            exact = torch.stack([before[name].double() for name in names])
            rounded = torch.stack(
                [after[name].double() * after[f"{name}_scale"].double() for name in names]
            )
            want = float((rounded - exact).square().sum().sqrt() / exact.square().sum().sqrt())
            assert got == pytest.approx(want, rel=1e-5)
            # Three bits behind the point: at most 1/16 off, half of that and less on average.
            assert 0.005 < got < 1 / 16
    for size, tensors in ((report.bytes_before, before), (report.bytes_after, after)):
        assert size == sum(value.numel() * value.element_size() for value in tensors.values())
    lines = report.table().splitlines()
    assert len(lines) == 1 + 2 + 1
    assert f"{report.layers[0].up:.5f}" in lines[1]
    assert f"{report.bytes_after:,} after" in lines[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tower_loads_the_weights_that_the_files_stand_for(
    source: Path, target: Path, dtype: torch.dtype
) -> None:
    quantize_checkpoint(source, target)
    after = read(target)
    plain = {name: value for name, value in after.items() if not name.endswith("_scale")}
    for name in plain:
        if EXPERT.fullmatch(name):
            plain[name] = plain[name].float() * after[f"{name}_scale"]
    widened = write_checkpoint(target.parent / "widened", tensors=plain)
    tokens = [[1, 7, 5, 9, 11, 3, 2]]
    towers = [load_context_tower(folder, dtype=dtype) for folder in (target, widened)]
    got, want = (tower.forward(tokens, [tower.new_state(8)]) for tower in towers)
    assert_same_bits(got, want)
    drafts = [load_denoiser_tower(folder, dtype=dtype) for folder in (target, widened)]
    got, want = (tower.forward(tokens, [0.5], [tower.new_state(8)]) for tower in drafts)
    assert_same_bits(got, want)
    moe = drafts[0].weights.layers[2].mixer
    assert isinstance(moe, MoeWeights)
    assert moe.up[0].dtype == dtype


def test_the_layout_of_the_files_stays(tmp_path: Path, target: Path) -> None:
    weight_map = write_shards(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    scales = {f"{name}_scale": file for name, file in weight_map.items() if EXPERT.fullmatch(name)}
    assert len(scales) == 16
    assert index["weight_map"] == weight_map | scales
    stored = read(target).values()
    size = sum(value.numel() * value.element_size() for value in stored)
    assert index["metadata"] == {"total_size": size}
    Checkpoint(target)


def test_the_config_gains_one_key(tmp_path: Path, target: Path) -> None:
    changes = {"time_step_limit": [0.0, math.inf], "torch_dtype": "bfloat16"}
    source = write_checkpoint(tmp_path / "source", changes=changes)
    quantize_checkpoint(source, target)
    assert raw_config(target) == raw_config(source) | {"quantization_config": FP8_EXPERTS}
    assert "Infinity" in (target / "config.json").read_text()
    assert TwoTowerConfig.from_file(target / "config.json") == small_config(quantized_experts=True)


def test_the_schema_names_exactly_what_is_quantized() -> None:
    """Readers of the schema quantize every linear layer that `ignore` does not name."""
    shapes = tensor_shapes(small_config(layer_pattern="M*E-E"))
    linear = {
        name.removesuffix(".weight")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2 and "embeddings" not in name
    }

    def ignored(layer: str) -> bool:
        return any(
            re.match(entry[3:], layer) if entry.startswith("re:") else entry == layer
            for entry in FP8_EXPERTS["ignore"]
        )

    assert {layer for layer in linear if not ignored(layer)} == {
        layer for layer in linear if ".experts." in layer
    }
    for entry in FP8_EXPERTS["ignore"]:
        pattern = entry[3:] if entry.startswith("re:") else re.escape(entry)
        assert any(re.match(pattern, layer) for layer in linear), entry


def test_other_files_are_copied_but_no_other_weights(source: Path, target: Path) -> None:
    (source / "tokenizer.json").write_bytes(b"{\x00}")
    (source / "LICENSE").write_text("text")
    (source / "sub").mkdir()
    for name in ("pytorch_model.bin", "stray.safetensors", "pytorch_model.bin.index.json"):
        (source / name).write_bytes(b"1234")
    quantize_checkpoint(source, target)
    names = {path.name for path in target.iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"}
    assert (target / "tokenizer.json").read_bytes() == b"{\x00}"


def test_early_names_are_kept(tmp_path: Path, target: Path) -> None:
    tensors = random_tensors(SMALL)
    early = "context_tower.embedding.weight"
    tensors[early] = tensors.pop("context_tower.embeddings.weight")
    quantize_checkpoint(write_checkpoint(tmp_path / "source", tensors=tensors), target)
    assert_same_bits(read(target)[early], tensors[early])
    Checkpoint(target)


def test_a_target_with_something_in_it_is_refused(source: Path, target: Path) -> None:
    target.mkdir()
    quantize_checkpoint(source, target)
    with pytest.raises(CheckpointError, match="target: exists already, expected a new or an empty"):
        quantize_checkpoint(source, target)
    with pytest.raises(CheckpointError, match="source: exists already"):
        quantize_checkpoint(source, source)
    with pytest.raises(CheckpointError, match=r"config\.json: exists already"):
        quantize_checkpoint(source, source / "config.json")


def test_what_cannot_be_quantized_is_refused(tmp_path: Path, source: Path, target: Path) -> None:
    quantize_checkpoint(source, target)
    other = tmp_path / "other"
    with pytest.raises(CheckpointError, match="target: its routed experts are quantized already"):
        quantize_checkpoint(target, other)
    dense = write_checkpoint(tmp_path / "dense", small_config(layer_pattern="M*-"))
    with pytest.raises(CheckpointError, match=r"hybrid_override_pattern: got 'M\*-', expected"):
        quantize_checkpoint(dense, other)
    (dense / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"^model.safetensors: missing"):
        quantize_checkpoint(dense, other)
    assert not other.exists()


@pytest.mark.parametrize("name", [ONE_EXPERT, "lm_head.weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_named(
    tmp_path: Path, target: Path, name: str, value: float
) -> None:
    tensors = random_tensors(SMALL)
    tensors[name][1, 2] = value
    source = write_checkpoint(tmp_path / "source", tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"^{name}: .*not finite"):
        quantize_checkpoint(source, target)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_finite_values_beyond_fp32_are_named(tmp_path: Path, target: Path) -> None:
    tensors = random_tensors(SMALL)
    tensors[ONE_EXPERT] = tensors[ONE_EXPERT].double() * 1e200
    source = write_checkpoint(tmp_path / "source", tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"^{ONE_EXPERT}: .*not finite"):
        quantize_checkpoint(source, target)


def test_a_failure_leaves_nothing_behind(
    source: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorFile, "write", full)
    with pytest.raises(CheckpointError, match="target: No space left on device"):
        quantize_checkpoint(source, target)
    assert [path.name for path in target.parent.iterdir()] == ["source"]


def test_what_a_killed_run_left_is_not_touched(source: Path, target: Path) -> None:
    left = target.parent / ".target.partial"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    with pytest.raises(CheckpointError, match=r"\.target\.partial: exists already; another run"):
        quantize_checkpoint(source, target)
    assert (left / "model.safetensors").read_text() == "half"
    assert not target.exists()


def test_a_channel_of_zeros_stays_zero(tmp_path: Path, target: Path) -> None:
    tensors = random_tensors(SMALL)
    tensors[ONE_EXPERT][5] = 0.0
    quantize_checkpoint(write_checkpoint(tmp_path / "source", tensors=tensors), target)
    after = read(target)
    assert_same_bits(after[ONE_EXPERT][5].float(), torch.zeros(8))
    assert bool(torch.isfinite(after[f"{ONE_EXPERT}_scale"]).all())
    load_denoiser_tower(target)


def test_a_damaged_quantized_checkpoint_is_named(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target)
    whole = read(target)
    config = TwoTowerConfig.from_file(target / "config.json")
    scale = f"{ONE_EXPERT}_scale"

    def check(changed: Tensors, message: str) -> None:
        write_checkpoint(target, config, {**whole, **changed})
        with pytest.raises(CheckpointError, match=message):
            load_denoiser_tower(target)

    check({ONE_EXPERT: whole[ONE_EXPERT].bfloat16()}, rf"^{ONE_EXPERT}: got dtype BF16.*F8_E4M3")
    check({scale: whole[scale][:, 0].clone()}, rf"^{scale}: got shape \[16\], expected \[16, 1\]")
    check({scale: whole[scale] * math.nan}, rf"^{scale}: .*not finite")
    poisoned = whole[ONE_EXPERT].view(torch.uint8).clone()
    poisoned[3, 1] = 0xFF
    check({ONE_EXPERT: poisoned.view(torch.float8_e4m3fn)}, rf"^{ONE_EXPERT}: .*not finite")
    check({"lm_head.weight": whole["lm_head.weight"].to(torch.float8_e4m3fn)}, r"^lm_head.weight:")
    write_checkpoint(target, config, {n: t for n, t in whole.items() if n != scale})
    with pytest.raises(CheckpointError, match=rf"^{scale}: missing"):
        Checkpoint(target)


def test_eight_bits_without_the_config_key_are_refused(source: Path, target: Path) -> None:
    quantize_checkpoint(source, target)
    write_checkpoint(target, SMALL, read(target))
    with pytest.raises(CheckpointError, match="weight_scale: unexpected tensor"):
        Checkpoint(target)


def test_a_stack_in_its_own_format(source: Path, target: Path) -> None:
    """As a GPU's loader reads it."""
    quantize_checkpoint(source, target)
    names = [ONE_EXPERT.replace("experts.3", f"experts.{expert}") for expert in (2, 0)]
    stack = read_quantized(Checkpoint(target), names, torch.device("cpu"))
    stored = read(target)
    assert (stack.values.shape, stack.scale.shape) == ((2, 16, 8), (2, 16))
    assert stack.scale.dtype == torch.float32
    for expert, name in enumerate(names):
        got, want = stack.values[expert], stored[name]
        assert got.dtype == want.dtype
        assert_same_bits(got.view(torch.uint8), want.view(torch.uint8), name)
        assert_same_bits(stack[expert], want.float() * stored[f"{name}_scale"], name)


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_a_stack_with_a_value_that_is_no_number_is_named(
    source: Path, target: Path, bits: int
) -> None:
    quantize_checkpoint(source, target)
    stored = read(target)
    poisoned = stored[ONE_EXPERT].view(torch.uint8).clone()
    poisoned[0, 0] = bits
    config = TwoTowerConfig.from_file(target / "config.json")
    write_checkpoint(target, config, stored | {ONE_EXPERT: poisoned.view(torch.float8_e4m3fn)})
    with pytest.raises(CheckpointError, match=rf"^{ONE_EXPERT}: .*not finite"):
        read_quantized(Checkpoint(target), [ONE_EXPERT], torch.device("cpu"))


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_pass_over_the_8_bits_themselves(source: Path, target: Path, backend: Backend) -> None:
    """Stacked as a GPU reads them, against the weights that they stand for."""
    quantize_checkpoint(source, target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain, stacked = (
        load_denoiser_tower(target),
        load_denoiser_tower(target, device, for_triton=True),
    )
    mixer = stacked.weights.layers[2].mixer
    assert isinstance(mixer, MoeWeights)
    assert isinstance(mixer.up, QuantizedExperts)
    block = [[5, 3, 3, 9, 3, 1, 3]]
    want = plain.logits(plain.forward(block, [0.5], [plain.new_state(8)]))
    with force(backend):
        hidden = stacked.forward(block, [0.5], [stacked.new_state(8)])
        got = stacked.logits(hidden).cpu()
    assert_relative_rms(got, want, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_with_products_in_8_bits(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Experts stay in 8 bits on a CPU too, and their tokens are rounded to them."""
    quantize_checkpoint(source, target)
    widened = load_denoiser_tower(target, dtype=dtype)
    narrow = load_denoiser_tower(target, dtype=dtype, expert_products="fp8")
    mixer = narrow.weights.layers[2].mixer
    assert isinstance(mixer, MoeWeights)
    assert isinstance(mixer.up, QuantizedExperts)
    assert mixer.up.products == "fp8"
    block = [[5, 3, 3, 9, 3, 1, 3]]
    got, want = (
        tower.logits(tower.forward(block, [0.5], [tower.new_state(8)])).float()
        for tower in (narrow, widened)
    )
    assert not torch.equal(got, want)
    assert_relative_rms(got, want, 0.05)


@pytest.mark.parametrize("load", [load_context_tower, load_denoiser_tower])
def test_products_in_8_bits_are_the_kernels_as_well(
    source: Path, target: Path, load: Callable[..., ContextTower | DenoiserTower]
) -> None:
    quantize_checkpoint(source, target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tower = load(target, device, for_triton=True, expert_products="fp8")
    mixer = tower.weights.layers[2].mixer
    assert isinstance(mixer, MoeWeights)
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(3)).to(device)
    ids = torch.tensor([[0, 3], [1, 2], [3, 1], [2, 0], [-1, 1], [0, 1]], device=device)
    given = x, ids, torch.rand(6, 2, generator=torch.Generator().manual_seed(4)).to(device)
    shared = mixer.shared.up, mixer.shared.down
    got, want = (
        experts(*given, mixer.up, mixer.down, *shared)
        for experts in (experts_triton.experts, moe.experts)
    )
    assert_relative_rms(got, want, 1e-3)


@pytest.mark.parametrize("load", [load_context_tower, load_denoiser_tower])
def test_products_in_8_bits_of_other_experts_are_refused(
    source: Path, load: Callable[..., object]
) -> None:
    with pytest.raises(ConfigError) as refused:
        load(source, expert_products="fp8")
    assert str(refused.value) == (
        "expert_products: got 'fp8', expected 'widened': the routed experts of source are not in "
        "8 bits (see twotower quantize)"
    )


def test_a_gpu_without_products_in_8_bits_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"cuda:0": (8, 9), "cuda:1": (8, 0), "cuda:2": (9, 0)}
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: known[str(device)])
    for name in ("cpu", "cuda:0", "cuda:2"):
        check_fp8_device(torch.device(name))
    with pytest.raises(ConfigError) as refused:
        check_fp8_device(torch.device("cuda:1"))
    assert str(refused.value) == (
        "expert_products: got 'fp8', expected 'widened' on cuda:1: its compute capability is 8.0, "
        "products in 8 bits need 8.9"
    )
