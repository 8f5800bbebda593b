"""A checkpoint folder: which tensors it must hold, where they are, and reading them.

Layout as released: config.json and safetensors, one file or shards with an index. Every name and
shape is checked against the config before any weight is read, so that a wrong checkpoint is
refused whole, by the name of its first wrong tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from twotower.towers.config import ATTENTION, MAMBA, MOE, TIMESTEP_FEATURES, TwoTowerConfig
from twotower.towers.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOWERS = ("context_tower", "denoiser_tower")
_FLOATING = {"F64", "F32", "F16", "BF16"}
Shape = tuple[int, ...]


def tensor_shapes(config: TwoTowerConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of a checkpoint with this config."""
    hidden, vocab = config.hidden_size, config.vocab_size
    shapes: dict[str, Shape] = {
        "context_lm_head.weight": (vocab, hidden),
        "lm_head.weight": (vocab, hidden),
        "t_embedder.mlp.0.weight": (hidden, TIMESTEP_FEATURES),
        "t_embedder.mlp.0.bias": (hidden,),
        "t_embedder.mlp.2.weight": (hidden, hidden),
        "t_embedder.mlp.2.bias": (hidden,),
        "t_block.1.weight": (3 * hidden, hidden),
        "t_block.1.bias": (3 * hidden,),
    }
    for index in range(config.num_layers):
        shapes[f"scale_shift_tables.{index}"] = (3, hidden)
    for tower in TOWERS:
        shapes[f"{tower}.embeddings.weight"] = (vocab, hidden)
        shapes[f"{tower}.norm_f.weight"] = (hidden,)
        for index, kind in enumerate(config.layer_pattern):
            prefix = f"{tower}.layers.{index}"
            shapes[f"{prefix}.norm.weight"] = (hidden,)
            for name, shape in _mixer_shapes(kind, config).items():
                shapes[f"{prefix}.mixer.{name}"] = shape
    return shapes


def _mixer_shapes(kind: str, config: TwoTowerConfig) -> dict[str, Shape]:
    if kind == MAMBA:
        return _mamba_shapes(config)
    if kind == ATTENTION:
        return _attention_shapes(config)
    if kind == MOE:
        return _moe_shapes(config)
    return _mlp_shapes("", config.hidden_size, config.intermediate_size, config.mlp_bias)


def _mamba_shapes(config: TwoTowerConfig) -> dict[str, Shape]:
    hidden, inner, heads = config.hidden_size, config.d_inner, config.mamba_num_heads
    projected = inner + config.conv_dim + heads
    shapes: dict[str, Shape] = {
        "in_proj.weight": (projected, hidden),
        "conv1d.weight": (config.conv_dim, 1, config.conv_kernel),
        "A_log": (heads,),
        "D": (heads,),
        "dt_bias": (heads,),
        "norm.weight": (inner,),
        "out_proj.weight": (hidden, inner),
    }
    if config.use_conv_bias:
        shapes["conv1d.bias"] = (config.conv_dim,)
    if config.use_bias:
        shapes |= {"in_proj.bias": (projected,), "out_proj.bias": (hidden,)}
    return shapes


def _attention_shapes(config: TwoTowerConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    sides = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
    sides["o_proj"] = (hidden, queries)
    shapes: dict[str, Shape] = {f"{name}.weight": shape for name, shape in sides.items()}
    if config.attention_bias:
        shapes |= {f"{name}.bias": shape[:1] for name, shape in sides.items()}
    return shapes


def _moe_shapes(config: TwoTowerConfig) -> dict[str, Shape]:
    hidden, bias = config.hidden_size, config.mlp_bias
    shapes: dict[str, Shape] = {
        "gate.weight": (config.n_routed_experts, hidden),
        "gate.e_score_correction_bias": (config.n_routed_experts,),
    }
    for expert in range(config.n_routed_experts):
        shapes |= _mlp_shapes(f"experts.{expert}.", hidden, config.moe_intermediate_size, bias)
    width = config.moe_shared_expert_intermediate_size
    return shapes | _mlp_shapes("shared_experts.", hidden, width, bias)


def _mlp_shapes(prefix: str, hidden: int, width: int, bias: bool) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {
        f"{prefix}up_proj.weight": (width, hidden),
        f"{prefix}down_proj.weight": (hidden, width),
    }
    if bias:
        shapes |= {f"{prefix}up_proj.bias": (width,), f"{prefix}down_proj.bias": (hidden,)}
    return shapes


class Checkpoint:
    """An opened checkpoint whose names, shapes and files have been checked."""

    def __init__(self, folder: Path, config: TwoTowerConfig | None = None) -> None:
        self.folder = folder
        self.config = config or TwoTowerConfig.from_file(folder / "config.json")
        self._files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        self._check()

    def read(self, name: str, target: Tensor) -> None:
        """Copies one tensor into `target`, converting its dtype; raises CheckpointError."""
        with _opened(self._files[name]) as file:
            stored = file.get_tensor(self._stored[name])
        if stored.shape != target.shape:
            stored = stored.view(target.shape)
        target.copy_(stored)
        # The extremes are NaN if any value is, and take no memory of the tensor's size.
        if not all(torch.isfinite(extreme) for extreme in torch.aminmax(target)):
            raise CheckpointError(f"{name}: holds values that are not finite")

    def _check(self) -> None:
        located = _locate(self.folder)
        shapes = tensor_shapes(self.config)
        for stored in located:
            name = _current_name(stored)
            if name not in shapes:
                raise CheckpointError(f"{stored}: unexpected tensor in the checkpoint")
            if name in self._stored:
                raise CheckpointError(f"{stored}: also in the checkpoint as {self._stored[name]}")
            self._stored[name] = stored
            self._files[name] = located[stored]
        for name in shapes:
            if name not in self._files:
                raise CheckpointError(f"{name}: missing from the checkpoint")
        for path in sorted(set(self._files.values())):
            self._check_shapes(path, shapes)

    def _check_shapes(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        with _opened(path) as file:
            present = set(file.keys())
            for name, own in self._files.items():
                if own != path:
                    continue
                if self._stored[name] not in present:
                    raise CheckpointError(f"{name}: the index names {path.name}, which lacks it")
                view = file.get_slice(self._stored[name])
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if shape != shapes[name]:
                    raise CheckpointError(
                        f"{name}: got shape {list(shape)}, expected {list(shapes[name])}"
                    )
                if dtype not in _FLOATING:
                    raise CheckpointError(
                        f"{name}: got dtype {dtype}, expected one of {', '.join(sorted(_FLOATING))}"
                    )


def _locate(folder: Path) -> dict[str, Path]:
    """Tensor name as stored -> file."""
    if not (folder / INDEX_FILE).exists():
        path = folder / SINGLE_FILE
        with _opened(path) as file:
            return dict.fromkeys(file.keys(), path)
    try:
        weight_map = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        entries = list(weight_map.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{INDEX_FILE}: not an index with a weight_map") from None
    located = {}
    for name, file_name in entries:
        inside = isinstance(file_name, str) and Path(file_name).name == file_name
        if not inside or file_name in ("", ".."):
            raise CheckpointError(f"{INDEX_FILE}: {name} points outside the checkpoint")
        located[name] = folder / file_name
    for path in set(located.values()):
        with _opened(path) as file:
            stray = set(file.keys()) - located.keys()
        if stray:
            raise CheckpointError(f"{min(stray)}: in {path.name} but not in the index")
    return located


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError(f"{path.name}: missing from the checkpoint") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path.name}: unreadable or truncated ({error})") from None


def _current_name(stored: str) -> str:
    """Early checkpoints say `embedding` for `embeddings`."""
    return stored.replace(".embedding.weight", ".embeddings.weight")
