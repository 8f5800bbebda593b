"""A checkpoint folder: names and shapes of its tensors, their files, and reading them.

Layout as released: config.json and safetensors, a single file or shards with an index. Every name
and shape is checked against the config before any weight is read, so that a wrong checkpoint is
refused as a whole, by the name of its first wrong tensor.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from twotower.kernels.quantized import FP8
from twotower.towers.checkpoint.open_files import OpenFiles, opened
from twotower.towers.config.model_config import (
    ATTENTION,
    MAMBA,
    MOE,
    TIMESTEP_FEATURES,
    TwoTowerConfig,
)
from twotower.towers.errors import CheckpointError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
TOWERS = ("context_tower", "denoiser_tower")
# By the names that safetensors files give them.
_FLOATING_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
# Sizes in bytes.
FLOATING = {name: dtype.itemsize for name, dtype in _FLOATING_DTYPES.items()}
FP8_NAME = "F8_E4M3"
Shape = tuple[int, ...]
# Gets the bytes that have been read so far, and those of all that will be.
ReadProgress = Callable[[int, int], None]
# Tower, layer index and up_proj or down_proj: the kind of a routed expert's matrix.
ExpertSide = tuple[str, int, str]


def expert_matrices(config: TwoTowerConfig) -> dict[str, ExpertSide]:
    """Routed experts' matrices by name, the only tensors that may be stored in 8 bits."""
    return {
        f"{tower}.layers.{layer}.mixer.experts.{expert}.{side}.weight": (tower, layer, side)
        for tower in TOWERS
        for layer in config.layers_of(MOE)
        for side in ("up_proj", "down_proj")
        for expert in range(config.n_routed_experts)
    }


def scale_name(name: str) -> str:
    """The name of the tensor [N, 1] with the scales of the 8-bit matrix `name` [N, K]."""
    return f"{name}_scale"


def tensor_shapes(config: TwoTowerConfig) -> dict[str, Shape]:
    """The shape of every tensor of a checkpoint with this config, by name."""
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
    if config.quantized_experts:
        for name in expert_matrices(config):
            shapes[scale_name(name)] = (shapes[name][0], 1)
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
    """A checkpoint folder whose tensor names, shapes, dtypes and files have been checked.

    Raises CheckpointError for the first that is wrong, ConfigError for its config.json. Threads may
    read side by side.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = TwoTowerConfig.from_file(folder / "config.json")
        self._files: dict[str, Path] = {}
        self._stored: dict[str, str] = {}
        self._dtypes: dict[str, str] = {}
        self._progress: ReadProgress | None = None
        self._bytes_read = self._bytes_to_read = 0
        self._telling = threading.Lock()
        self._open_files = OpenFiles()
        self._check()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def names_by_file(self) -> dict[Path, list[str]]:
        """The names of the tensors in each file."""
        by_file: dict[Path, list[str]] = {}
        for name, path in self._files.items():
            by_file.setdefault(path, []).append(name)
        return by_file

    def name_in_file(self, name: str) -> str:
        """The name under which a tensor is stored, which differs in early checkpoints."""
        return self._stored[name]

    def dtype_name(self, name: str) -> str:
        """The dtype of a tensor as its file names it, like BF16."""
        return self._dtypes[name]

    def bytes_of(self, names: Iterable[str]) -> int:
        """Bytes of tensors as they are stored."""
        shapes, sizes = tensor_shapes(self.config), FLOATING | {FP8_NAME: 1}
        return sum(math.prod(shapes[name]) * sizes[self._dtypes[name]] for name in names)

    def watch(self, names: Iterable[str], progress: ReadProgress | None) -> None:
        """Tells `progress` of each tensor that is read from now on, which will be `names`; it is
        called in the thread that reads, by one at a time."""
        self._progress = progress
        self._bytes_read, self._bytes_to_read = 0, self.bytes_of(names)

    def read(self, name: str, target: Tensor) -> None:
        """Copies a tensor into `target`, converted to its dtype. Raises CheckpointError for an
        unreadable file and values that are not finite."""
        stored = self._mapped(name)
        if stored.shape != target.shape:
            stored = stored.view(target.shape)
        target.copy_(stored)
        _check_finite(name, target)

    def lying(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor in its mapped file, only to be read, or None if it is stored in another dtype;
        raises as `read`."""
        if _FLOATING_DTYPES.get(self._dtypes[name]) != dtype:
            return None
        return self.read_stored(name)

    def read_stored(self, name: str) -> Tensor:
        """A tensor in the dtype in which it is stored; raises as `read`."""
        stored = self._mapped(name)
        _check_finite(name, stored)
        return stored

    def _mapped(self, name: str) -> Tensor:
        tensor = self._open_files.tensor(self._files[name], self._stored[name])
        if self._progress is not None:
            with self._telling:
                self._bytes_read += tensor.nbytes
                self._progress(self._bytes_read, self._bytes_to_read)
        return tensor

    def _check(self) -> None:
        """Locates all tensors; raises CheckpointError for the first wrong name, shape or dtype."""
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
        quantized = expert_matrices(self.config) if self.config.quantized_experts else {}
        for name, dtype in self._dtypes.items():
            allowed = (FP8_NAME,) if name in quantized else tuple(sorted(FLOATING))
            if dtype not in allowed:
                raise CheckpointError(
                    f"{name}: got dtype {dtype}, expected one of {', '.join(allowed)}"
                )

    def _check_shapes(self, path: Path, shapes: Mapping[str, Shape]) -> None:
        with opened(path) as file:
            present = set(file.keys())
            for name, file_path in self._files.items():
                if file_path != path:
                    continue
                if self._stored[name] not in present:
                    raise CheckpointError(f"{name}: the index names {path.name}, which lacks it")
                view = file.get_slice(self._stored[name])
                shape = tuple(view.get_shape())
                if shape != shapes[name]:
                    raise CheckpointError(
                        f"{name}: got shape {list(shape)}, expected {list(shapes[name])}"
                    )
                self._dtypes[name] = view.get_dtype()


def _locate(folder: Path) -> dict[str, Path]:
    """The file of every tensor, by the name under which it is stored; raises CheckpointError."""
    if not (folder / INDEX_FILE).exists():
        path = folder / SINGLE_FILE
        with opened(path) as file:
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
        with opened(path) as file:
            stray = set(file.keys()) - located.keys()
        if stray:
            raise CheckpointError(f"{min(stray)}: in {path.name} but not in the index")
    return located


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError if any value is not finite."""
    if tensor.dtype == FP8:
        # This format has no infinities, and no operator finds its NaN: all bits but the sign set.
        finite = bool(((tensor.view(torch.uint8) & 0x7F) != 0x7F).all())
    else:
        # Minimum and maximum are NaN if any value is; no mask of the tensor's size is allocated.
        finite = all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
    if not finite:
        raise CheckpointError(f"{name}: holds values that are not finite")


def _current_name(stored: str) -> str:
    """A stored name in today's spelling: early checkpoints have `embedding` for `embeddings`."""
    return stored.replace(".embedding.weight", ".embeddings.weight")
