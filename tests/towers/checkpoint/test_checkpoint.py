"""Reading checkpoints: the tensors of a single tower, and every fault by its name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.comparing import assert_same_bits
from tests.support.random_model import (
    SMALL,
    random_tensors,
    small_config,
    write_checkpoint,
    write_index,
    write_shards,
)
from twotower.towers.checkpoint import open_files as module
from twotower.towers.checkpoint import tower_loader
from twotower.towers.checkpoint.checkpoint import Checkpoint, tensor_shapes
from twotower.towers.checkpoint.weights import (
    load_context_tower,
    load_denoiser_tower,
    parse_dtype,
    resolve_checkpoint,
)
from twotower.towers.engine.load import load_engines
from twotower.towers.errors import CheckpointError, ConfigError
from twotower.towers.model.weights import AttentionWeights, MambaWeights, MlpWeights, MoeWeights

SHARD = "model-00001-of-00002.safetensors"
SOME_TENSORS = [
    "lm_head.weight",
    "context_lm_head.weight",
    "context_tower.embeddings.weight",
    "denoiser_tower.layers.0.mixer.A_log",
    "context_tower.layers.0.mixer.conv1d.bias",
    "denoiser_tower.layers.1.mixer.k_proj.weight",
    "context_tower.layers.2.mixer.gate.e_score_correction_bias",
    "denoiser_tower.layers.2.mixer.experts.3.down_proj.weight",
    "scale_shift_tables.3",
    "t_block.1.bias",
]
Load = Callable[[Path], object]


@pytest.fixture
def read_names(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts every tensor whose numbers are read from a file."""
    seen: Counter[str] = Counter()

    class CountingFile:
        def __init__(self, path: Path, framework: str) -> None:
            self._file = safetensors.safe_open(path, framework=framework)

        def __enter__(self) -> CountingFile:
            self._file.__enter__()
            return self

        def __exit__(self, *details: Any) -> None:
            self._file.__exit__(*details)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_slice(self, name: str) -> Any:
            return self._file.get_slice(name)

        def get_tensor(self, name: str) -> Tensor:
            seen[name] += 1
            tensor: Tensor = self._file.get_tensor(name)
            return tensor

    monkeypatch.setattr(module, "safe_open", CountingFile)
    return seen


def is_context(name: str) -> bool:
    return name.startswith(("context_tower.", "context_lm_head."))


def test_each_tower_reads_its_own_tensors_once_and_no_other(
    folder: Path, read_names: Counter[str]
) -> None:
    names = set(tensor_shapes(Checkpoint(folder).config))
    load_context_tower(folder)
    assert read_names == Counter({name: 1 for name in names if is_context(name)})
    read_names.clear()
    load_denoiser_tower(folder)
    assert read_names == Counter({name: 1 for name in names if not is_context(name)})


@pytest.mark.parametrize("load", [load_context_tower, load_denoiser_tower])
def test_progress_counts_the_bytes_of_the_tower_in_its_file(tmp_path: Path, load: Any) -> None:
    folder = write_checkpoint(tmp_path / "model")
    told: list[tuple[int, int]] = []
    load(folder, progress=lambda *one: told.append(one))
    mine = [
        tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
        if is_context(name) == (load is load_context_tower)
    ]
    size = sum(tensor.nbytes for tensor in mine)
    assert len(told) == len(mine)
    assert {total for _, total in told} == {size}
    done = [0, *(so_far for so_far, _ in told)]
    steps = [after - before for before, after in pairwise(done)]
    assert sorted(steps) == sorted(tensor.nbytes for tensor in mine)
    assert done[-1] == size


def test_progress_of_both_towers_is_one(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "model")
    told: list[tuple[int, int]] = []
    load_engines(folder, "cpu", "cpu", torch.float32, progress=lambda *one: told.append(one))
    size = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert told[-1] == (size, size)
    assert all(before < after for (before, _), (after, _) in pairwise(told))
    assert all(done <= total for done, total in told)


def test_the_other_towers_numbers_may_be_anything(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    for name, value in tensors.items():
        if not is_context(name):
            value.fill_(float("nan"))
    write_checkpoint(tmp_path, tensors=tensors)
    load_context_tower(tmp_path)
    with pytest.raises(CheckpointError, match=r"denoiser_tower\.\S+: holds values .* not finite"):
        load_denoiser_tower(tmp_path)


def test_numbers_and_dtypes_of_what_is_loaded(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    write_checkpoint(tmp_path, tensors=tensors)
    tower = load_context_tower(tmp_path, dtype=torch.bfloat16)
    assert_same_bits(tower.weights.embedding, tensors["context_tower.embeddings.weight"].bfloat16())
    mamba, attention, moe, _ = (layer.mixer for layer in tower.weights.layers)
    assert isinstance(mamba, MambaWeights)
    assert isinstance(attention, AttentionWeights)
    assert isinstance(moe, MoeWeights)
    assert_same_bits(mamba.a_log, tensors["context_tower.layers.0.mixer.A_log"])
    conv = tensors["context_tower.layers.0.mixer.conv1d.weight"]
    assert_same_bits(mamba.conv_weight, conv[:, 0].bfloat16())
    assert mamba.d.dtype == mamba.dt_bias.dtype == moe.choice_bias.dtype == torch.float32
    assert attention.qkv.shape == (4 * 4 + 2 * 2 * 4, 16)
    gate = tensors["context_tower.layers.2.mixer.gate.weight"]
    assert_same_bits(moe.gate, gate.double())
    assert len(moe.up) == 4


def test_without_a_packed_layout_every_matrix_has_its_own_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(SMALL)
    write_checkpoint(tmp_path, tensors=tensors)
    monkeypatch.setattr(tower_loader, "pack", lambda matrix: matrix)
    tower = load_context_tower(tmp_path)
    assert_same_bits(tower.weights.head, tensors["context_lm_head.weight"])
    mamba, _, moe, mlp = (layer.mixer for layer in tower.weights.layers)
    assert isinstance(mamba, MambaWeights)
    assert isinstance(moe, MoeWeights)
    assert isinstance(mlp, MlpWeights)
    prefix = "context_tower.layers"
    assert_same_bits(mamba.in_proj, tensors[f"{prefix}.0.mixer.in_proj.weight"])
    assert_same_bits(mlp.up, tensors[f"{prefix}.3.mixer.up_proj.weight"])
    for expert, matrix in enumerate(moe.down):
        assert_same_bits(matrix, tensors[f"{prefix}.2.mixer.experts.{expert}.down_proj.weight"])


def test_shards_give_what_one_file_gives(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one")
    write_shards(tmp_path / "two")
    one, two = load_denoiser_tower(tmp_path / "one"), load_denoiser_tower(tmp_path / "two")
    assert_same_bits(one.weights.embedding, two.weights.embedding)
    assert_same_bits(one.timestep.table, two.timestep.table)
    state = one.new_state(4)
    hidden = one.forward([[3, 3, 3]], [1.0], [state])
    assert_same_bits(two.forward([[3, 3, 3]], [1.0], [state]), hidden)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bfloat16])
def test_any_stored_float_is_converted(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: value.to(dtype) for name, value in random_tensors(SMALL).items()}
    tower = load_context_tower(write_checkpoint(tmp_path, tensors=tensors))
    want = tensors["context_tower.embeddings.weight"].float()
    assert_same_bits(tower.weights.embedding, want)


def test_biases_are_part_of_the_layout_when_the_config_says_so() -> None:
    config = small_config(use_bias=True, attention_bias=True, mlp_bias=True, layer_pattern="M*-")
    shapes = tensor_shapes(config)
    assert shapes["context_tower.layers.0.mixer.in_proj.bias"] == (52,)
    assert shapes["denoiser_tower.layers.1.mixer.k_proj.bias"] == (8,)
    assert shapes["denoiser_tower.layers.2.mixer.up_proj.bias"] == (8,)
    assert "context_tower.layers.0.mixer.in_proj.bias" not in tensor_shapes(SMALL)


def test_layers_with_biases_load(tmp_path: Path) -> None:
    config = small_config(use_bias=True, attention_bias=True, mlp_bias=True, layer_pattern="M*-")
    tower = load_context_tower(write_checkpoint(tmp_path, config))
    state = tower.new_state(3)
    assert bool(torch.isfinite(tower.forward([[1, 2, 3]], [state])).all())


def test_released_names_and_shapes() -> None:
    shapes = tensor_shapes(SMALL)
    assert shapes["context_tower.layers.0.mixer.in_proj.weight"] == (16 + 32 + 4, 16)
    assert shapes["context_tower.layers.0.mixer.conv1d.weight"] == (32, 1, 4)
    assert shapes["denoiser_tower.layers.2.mixer.experts.0.up_proj.weight"] == (8, 16)
    assert shapes["t_embedder.mlp.0.weight"] == (16, 256)
    assert shapes["t_block.1.weight"] == (48, 16)
    assert shapes["scale_shift_tables.0"] == (3, 16)
    assert not any("gate_proj" in name for name in shapes)


@pytest.mark.parametrize("load", [load_context_tower, load_denoiser_tower])
@pytest.mark.parametrize("name", SOME_TENSORS)
def test_a_missing_tensor_is_named_by_both_towers(tmp_path: Path, name: str, load: Load) -> None:
    tensors = random_tensors(SMALL)
    del tensors[name]
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=f"^{name}: missing"):
        load(tmp_path)


@pytest.mark.parametrize("name", SOME_TENSORS)
def test_a_misshapen_tensor_is_named(tmp_path: Path, name: str) -> None:
    tensors = random_tensors(SMALL)
    tensors[name] = torch.cat((tensors[name], tensors[name]))
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=rf"^{name}: got shape \[.*expected \["):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_a_tensor_of_whole_numbers_is_named(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = random_tensors(SMALL)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(dtype)
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"^lm_head.weight: got dtype"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name", ["extra", "context_tower.layers.4.norm.weight", "context_tower.layers.1.mixer.q_norm"]
)
def test_an_extra_tensor_is_named(tmp_path: Path, name: str) -> None:
    write_checkpoint(tmp_path, tensors=random_tensors(SMALL) | {name: torch.zeros(2)})
    with pytest.raises(CheckpointError, match=f"^{name}: unexpected"):
        Checkpoint(tmp_path)


def test_the_early_name_of_the_embedding(tmp_path: Path) -> None:
    tensors = random_tensors(SMALL)
    want = tensors.pop("context_tower.embeddings.weight")
    tensors["context_tower.embedding.weight"] = want
    write_checkpoint(tmp_path, tensors=tensors)
    assert_same_bits(load_context_tower(tmp_path).weights.embedding, want)
    write_checkpoint(tmp_path, tensors=tensors | {"context_tower.embeddings.weight": want.clone()})
    with pytest.raises(CheckpointError, match=r"also in the checkpoint as"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, kept: float) -> None:
    path = write_checkpoint(tmp_path) / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept if kept >= 4 else kept * len(whole))])
    with pytest.raises(CheckpointError, match=r"^model.safetensors: unreadable or truncated"):
        load_context_tower(tmp_path)


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    whole = (tmp_path / SHARD).read_bytes()
    (tmp_path / SHARD).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"^{SHARD}: unreadable or truncated"):
        load_denoiser_tower(tmp_path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"^{SHARD}: missing"):
        Checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"^model.safetensors: missing"):
        Checkpoint(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"^config.json: not found"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": []}'])
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write_shards(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index.json: not an index|missing from"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "target", ["../{}", "/{}", "..", "", ".", "sub/{}", "./{}", 5, None, ["x"]]
)
def test_an_index_may_not_point_outside_its_folder(tmp_path: Path, target: object) -> None:
    folder = tmp_path / "inner"
    weight_map: dict[str, object] = dict(write_shards(folder))
    (tmp_path / SHARD).write_bytes((folder / SHARD).read_bytes())
    name = next(name for name, file in weight_map.items() if file == SHARD)
    weight_map[name] = target.format(SHARD) if isinstance(target, str) else target
    write_index(folder, weight_map)
    with pytest.raises(CheckpointError, match=rf"{name} points outside"):
        Checkpoint(folder)


def test_an_index_that_disagrees_with_its_shards_is_refused(tmp_path: Path) -> None:
    weight_map = write_shards(tmp_path)
    name = next(name for name, file in weight_map.items() if file == SHARD)
    write_index(tmp_path, weight_map | {name: SHARD.replace("1-of", "2-of")})
    with pytest.raises(CheckpointError, match=rf"^{name}: the index names \S+, which lacks it"):
        Checkpoint(tmp_path)
    write_index(tmp_path, {key: file for key, file in weight_map.items() if key != name})
    with pytest.raises(CheckpointError, match=rf"^{name}: in {SHARD} but not in the index"):
        Checkpoint(tmp_path)


def test_pickles_are_never_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(random_tensors(SMALL), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"^model.safetensors: missing"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_named(tmp_path: Path, value: float) -> None:
    tensors = random_tensors(SMALL)
    tensors["context_tower.layers.1.mixer.k_proj.weight"][2, 3] = value
    write_checkpoint(tmp_path, tensors=tensors)
    with pytest.raises(CheckpointError, match=r"layers.1.mixer.k_proj.weight: .*not finite"):
        load_context_tower(tmp_path)


def test_a_wrong_config_is_refused_before_any_weight(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, changes={"query_norm": True})
    with pytest.raises(ConfigError, match=r"^query_norm: unknown"):
        load_context_tower(tmp_path)


def test_what_names_no_checkpoint(tmp_path: Path) -> None:
    for name in (tmp_path / "absent", "just-a-name", "./a/b", "a/b/c"):
        with pytest.raises(CheckpointError, match="not a folder, nor a hub id"):
            resolve_checkpoint(name)
    assert resolve_checkpoint(str(tmp_path)) == tmp_path
    assert resolve_checkpoint(None).name == "pystdlib"


def test_dtypes_by_name() -> None:
    assert parse_dtype("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype: got 'float16', expected .*float32, bfloat16"):
        parse_dtype("float16")


def test_a_folder_written_here_is_the_released_layout(tmp_path: Path) -> None:
    """`write_checkpoint` writes a single file with the released keys."""
    write_checkpoint(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["hybrid_override_pattern"] == "M*E-"
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(tensor_shapes(SMALL))
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    Checkpoint(tmp_path)


def test_a_tower_that_does_not_fit_is_refused_with_the_arithmetic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    own = [v for k, v in tensors.items() if k.startswith(("context_tower.", "context_lm_head."))]
    needed = 4 * sum(value.numel() for value in own)
    monkeypatch.setattr(tower_loader, "free_bytes", lambda _: needed)
    load_context_tower(folder)
    monkeypatch.setattr(tower_loader, "free_bytes", lambda _: needed - 1)
    message = f"{needed - 1} bytes are free on cpu, expected at least {needed} for the weights of"
    with pytest.raises(ConfigError, match=f"memory: {message} context_tower in float32"):
        load_context_tower(folder)
