"""From a checkpoint to a tower, straight to its device and dtype, one tower at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor

from twotower.kernels.causal_conv1d import tap_major
from twotower.kernels.linear import pack
from twotower.kernels.moe import ExpertWeights, narrow_parts
from twotower.kernels.quantized import FP8, QuantizedExperts
from twotower.towers.checkpoint.checkpoint import (
    Checkpoint,
    expert_matrices,
    scale_name,
    tensor_shapes,
)
from twotower.towers.config.model_config import ATTENTION, MAMBA, MOE, TwoTowerConfig
from twotower.towers.errors import CheckpointError, ConfigError, InvalidRequestError, shorten
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import (
    AttentionWeights,
    LayerWeights,
    MambaWeights,
    Mixer,
    MlpWeights,
    MoeWeights,
    TimestepWeights,
    TowerWeights,
)
from twotower.towers.state.budget import free_bytes

SHIPPED_MODEL = Path(str(files("twotower"))) / "models" / "pystdlib"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_HUB_FILES = ["*.safetensors", "*.json", "tokenizer*", "*.txt"]


def resolve_checkpoint(path: str | Path | None) -> Path:
    """A folder, a hub id (fetched: safetensors, json and tokenizer files only), or None for the
    shipped model. Raises CheckpointError if there is no such thing."""
    if path is None:
        return SHIPPED_MODEL
    if path == "":
        # As a path it would be this very folder.
        raise CheckpointError("'': not a folder, nor a hub id like owner/name")
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError, ValueError):
        # Too long, with a NUL, or of a user that is not there: no folder's name.
        raise CheckpointError(f"{shorten(str(path))}: not a folder's name") from None
    if str(path).count("/") != 1 or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path}: not a folder, nor a hub id like owner/name")
    return _fetched(str(path))


def _fetched(hub_id: str) -> Path:
    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{hub_id}: could not be fetched ({type(error).__name__})") from None
    except Exception as error:
        # A proxy or a token that no header can hold, and the client has an error of its own for
        # each. Its text may have the token in it.
        raise CheckpointError(
            f"{hub_id}: could not be asked for ({type(error).__name__}); look at the hub's token "
            "and the proxies in the environment"
        ) from None


def parse_device(name: str | torch.device) -> torch.device:
    """`cpu`, `cuda` or one of the machine's GPUs (`cuda:1`). Raises ConfigError for what is no
    such device, or is not there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device: got {shorten(str(name))}, expected cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            there = f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0" if count else "cpu"
            raise ConfigError(f"device: got {str(name)!r}, expected {there}: {count} GPUs are here")
    elif device.index:
        raise ConfigError(f"device: got {str(name)!r}, expected cpu")
    return device


def parse_dtype(name: str) -> torch.dtype:
    """`float32` or `bfloat16`; raises InvalidRequestError, a ValueError, for anything else."""
    if not isinstance(name, str) or name not in DTYPES:
        raise InvalidRequestError("dtype", name, f"one of {', '.join(DTYPES)}")
    return DTYPES[name]


def load_context_tower(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    for_triton: bool | None = None,
) -> ContextTower:
    """Reads the context tower and its head; the denoiser's tensors are never touched. Raises
    CheckpointError, and ConfigError if the device has no room.

    `for_triton` (None: on CUDA) keeps matrices as Triton's kernels read them, experts stacked;
    otherwise they are packed for a CPU's products.
    """
    loader = _Loader(Checkpoint(folder), torch.device(device), dtype, for_triton)
    return ContextTower(loader.config, loader.tower("context_tower", "context_lm_head"))


def load_denoiser_tower(
    folder: Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    for_triton: bool | None = None,
) -> DenoiserTower:
    """Reads the denoiser tower, its head and its timestep conditioning; as the context tower."""
    loader = _Loader(Checkpoint(folder), torch.device(device), dtype, for_triton)
    weights = loader.tower("denoiser_tower", "lm_head")
    return DenoiserTower(loader.config, weights, loader.timestep())


def read_quantized(
    checkpoint: Checkpoint, names: Sequence[str], device: torch.device
) -> QuantizedExperts:
    """Routed experts' matrices of one shape [N, K], 8 bits in the file, stacked on a device."""
    rows, columns = tensor_shapes(checkpoint.config)[names[0]]
    values = torch.empty((len(names), rows, columns), device=device, dtype=FP8)
    scale = torch.empty((len(names), rows), device=device)
    for expert, name in enumerate(names):
        checkpoint.read(name, values[expert])
        checkpoint.read(scale_name(name), scale[expert].unsqueeze(-1))
    return QuantizedExperts(values, scale)


class _Loader:
    """Reads each tensor straight to the device, dtype and layout that it will be used in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        for_triton: bool | None,
    ) -> None:
        self.config: TwoTowerConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._shapes = tensor_shapes(checkpoint.config)
        self._device = device
        self._dtype = dtype
        self._packs = not (device.type == "cuda" if for_triton is None else for_triton)
        self._buffer = self._empty((0,), None)

    def tower(self, tower: str, head: str) -> TowerWeights:
        self._check_room((f"{tower}.", f"{head}."))
        return TowerWeights(
            self._one(f"{tower}.embeddings.weight"),
            tuple(
                LayerWeights(
                    kind,
                    self._one(f"{tower}.layers.{index}.norm.weight"),
                    self._mixer(kind, f"{tower}.layers.{index}.mixer"),
                )
                for index, kind in enumerate(self.config.layer_pattern)
            ),
            self._one(f"{tower}.norm_f.weight"),
            self._matrix(f"{head}.weight"),
        )

    def _check_room(self, prefixes: tuple[str, ...]) -> None:
        """Raises ConfigError if a tower's matrices cannot fit into what is free."""
        experts = expert_matrices(self.config) if self.config.quantized_experts else {}
        needed = 0
        for name, shape in self._shapes.items():
            if name.startswith(prefixes):
                stacked = name in experts and not self._packs
                width = 1 if stacked else self._dtype.itemsize
                needed += math.prod(shape) * width
        free = free_bytes(self._device)
        if needed > free:
            raise ConfigError(
                f"memory: {free} bytes are free on {self._device}, expected at least {needed} for "
                f"the weights of {prefixes[0].rstrip('.')} in {str(self._dtype).split('.')[-1]}"
            )

    def timestep(self) -> TimestepWeights:
        tables = [f"scale_shift_tables.{index}" for index in range(self.config.num_layers)]
        return TimestepWeights(
            self._matrix("t_embedder.mlp.0.weight"),
            self._one("t_embedder.mlp.0.bias"),
            self._matrix("t_embedder.mlp.2.weight"),
            self._one("t_embedder.mlp.2.bias"),
            self._matrix("t_block.1.weight"),
            self._one("t_block.1.bias"),
            self._stacked(tables),
        )

    def _mixer(self, kind: str, prefix: str) -> Mixer:
        if kind == MAMBA:
            return self._mamba(prefix)
        if kind == ATTENTION:
            sides = [f"{prefix}.{side}" for side in ("q_proj", "k_proj", "v_proj")]
            with_bias = self.config.attention_bias
            return AttentionWeights(
                self._packed([f"{side}.weight" for side in sides]),
                self._joined([f"{side}.bias" for side in sides]) if with_bias else None,
                self._matrix(f"{prefix}.o_proj.weight"),
                self._optional(f"{prefix}.o_proj.bias"),
            )
        if kind == MOE:
            return self._moe(prefix)
        return self._mlp(prefix)

    def _mamba(self, prefix: str) -> MambaWeights:
        wide = torch.float32
        conv_shape = (self.config.conv_dim, self.config.conv_kernel)
        return MambaWeights(
            self._matrix(f"{prefix}.in_proj.weight"),
            self._optional(f"{prefix}.in_proj.bias"),
            tap_major(self._one(f"{prefix}.conv1d.weight", shape=conv_shape)),
            self._optional(f"{prefix}.conv1d.bias"),
            self._one(f"{prefix}.A_log", wide),
            self._one(f"{prefix}.D", wide),
            self._one(f"{prefix}.dt_bias", wide),
            self._one(f"{prefix}.norm.weight"),
            self._matrix(f"{prefix}.out_proj.weight"),
            self._optional(f"{prefix}.out_proj.bias"),
        )

    def _moe(self, prefix: str) -> MoeWeights:
        if self.config.mlp_bias:
            raise CheckpointError("mlp_bias: got True, expected False in a model with MoE layers")
        experts = range(self.config.n_routed_experts)
        gate = self._one(f"{prefix}.gate.weight", torch.float64)
        narrow = not self._packs and self._dtype == torch.bfloat16
        return MoeWeights(
            gate,
            # Stays fp32 in a bf16 model: rounding it moves borderline choices of experts.
            self._one(f"{prefix}.gate.e_score_correction_bias", torch.float32),
            self._experts([f"{prefix}.experts.{e}.up_proj.weight" for e in experts]),
            self._experts([f"{prefix}.experts.{e}.down_proj.weight" for e in experts]),
            self._mlp(f"{prefix}.shared_experts"),
            narrow_parts(gate) if narrow else None,
        )

    def _mlp(self, prefix: str) -> MlpWeights:
        return MlpWeights(
            self._matrix(f"{prefix}.up_proj.weight"),
            self._optional(f"{prefix}.up_proj.bias"),
            self._matrix(f"{prefix}.down_proj.weight"),
            self._optional(f"{prefix}.down_proj.bias"),
        )

    def _one(
        self, name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        target = self._empty(shape or self._shapes[name], dtype)
        self._checkpoint.read(name, target)
        return target

    def _matrix(self, name: str) -> Tensor:
        return self._packed([name])

    def _packed(self, names: Sequence[str]) -> Tensor:
        """Matrices of one width on top of each other, packed if that is the device's way."""
        shape = self._joined_shape(names)
        target = self._staging(shape) if self._packs else self._empty(shape, None)
        self._read_joined(names, target)
        return self._kept(target)

    def _kept(self, target: Tensor) -> Tensor:
        """A matrix in its lasting layout, out of the staging room if it was read there."""
        if not self._packs:
            return target
        packed = pack(target)
        return target.clone() if packed is target else packed

    def _staging(self, shape: tuple[int, ...]) -> Tensor:
        """Room for a matrix until it is packed. One buffer serves them all: thousands of short
        allocations between lasting ones would leave holes of nearly the tower's size."""
        count = torch.Size(shape).numel()
        if self._buffer.numel() < count:
            self._buffer = self._empty((count,), None)
        return self._buffer[:count].view(shape)

    def _experts(self, names: Sequence[str]) -> ExpertWeights:
        quantized = self.config.quantized_experts
        if self._packs:
            return [self._widened(name) if quantized else self._matrix(name) for name in names]
        if quantized:
            return read_quantized(self._checkpoint, names, self._device)
        return self._stacked(names)

    def _widened(self, name: str) -> Tensor:
        """An 8-bit matrix in the working dtype: a CPU has no products that would gain by 8 bits.

        Every 8-bit value is one of bf16 as well, so that only the product with the scale rounds.
        """
        target = self._staging(self._shapes[name])
        self._checkpoint.read(name, target)
        target.mul_(self._one(scale_name(name), torch.float32))
        return self._kept(target)

    def _optional(self, name: str) -> Tensor | None:
        return self._one(name) if name in self._shapes else None

    def _stacked(self, names: Sequence[str]) -> Tensor:
        target = self._empty((len(names), *self._shapes[names[0]]), None)
        for part, name in zip(target, names, strict=True):
            self._checkpoint.read(name, part)
        return target

    def _joined(self, names: Sequence[str]) -> Tensor:
        target = self._empty(self._joined_shape(names), None)
        self._read_joined(names, target)
        return target

    def _joined_shape(self, names: Sequence[str]) -> tuple[int, ...]:
        rows = sum(self._shapes[name][0] for name in names)
        return (rows, *self._shapes[names[0]][1:])

    def _read_joined(self, names: Sequence[str], target: Tensor) -> None:
        """Reads tensors on top of each other into `target`, without a copy between."""
        sizes = [self._shapes[name][0] for name in names]
        for part, name in zip(target.split(sizes), names, strict=True):
            self._checkpoint.read(name, part)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        return torch.empty(shape, device=self._device, dtype=dtype or self._dtype)
