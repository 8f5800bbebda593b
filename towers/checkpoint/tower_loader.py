"""Reads the tensors of a tower, each straight to the device, dtype and layout of its use."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import tap_major
from twotower.kernels.linear import pack, try_single_row
from twotower.kernels.moe import ExpertWeights, narrow_parts
from twotower.kernels.quantized import FP8, ExpertProducts, QuantizedExperts
from twotower.towers.checkpoint.checkpoint import (
    expert_matrices,
    scale_name,
    tensor_shapes,
)
from twotower.towers.checkpoint.side_by_side import threads_side_by_side
from twotower.towers.config.model_config import ATTENTION, MAMBA, MOE, TwoTowerConfig
from twotower.towers.errors import CheckpointError, ConfigError
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

# Ada's and Hopper's tensor cores are the first that multiply e4m3 values.
_FP8_CAPABILITY = (8, 9)
# Elements of the largest buffer that a thread keeps for its next matrix.
_MOST_STAGED = 16 << 20


class Tensors(Protocol):
    """A model's config and tensors by name: a checkpoint, or what stands in for one."""

    @property
    def name(self) -> str:
        """What it is called in errors."""

    @property
    def config(self) -> TwoTowerConfig:
        """Shapes of the towers."""

    def read(self, name: str, target: Tensor) -> None:
        """Copies a tensor into `target`, converted to its dtype. Raises CheckpointError."""

    def lying(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor where it lies, only to be read; None if it lies nowhere in this dtype. Raises
        CheckpointError."""


def check_expert_products(checkpoint: Tensors, products: ExpertProducts) -> None:
    """Raises ConfigError for 8-bit products of experts that are not stored in 8 bits."""
    if products == "fp8" and not checkpoint.config.quantized_experts:
        raise ConfigError(
            f"expert_products: got 'fp8', expected 'widened': the routed experts of "
            f"{checkpoint.name} are not in 8 bits (see twotower quantize)"
        )


def check_fp8_device(device: torch.device) -> None:
    """Raises ConfigError for a GPU without products of 8-bit values; a CPU has them in fp32."""
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < _FP8_CAPABILITY:
        own, least = (".".join(map(str, each)) for each in (capability, _FP8_CAPABILITY))
        raise ConfigError(
            f"expert_products: got 'fp8', expected 'widened' on {device}: its compute capability "
            f"is {own}, products in 8 bits need {least}"
        )


def read_quantized(
    checkpoint: Tensors,
    names: Sequence[str],
    device: torch.device,
    products: ExpertProducts = "widened",
) -> QuantizedExperts:
    """Reads E 8-bit matrices [N, K] of routed experts, and their scales, stacked on `device`, to be
    multiplied as `products` says."""
    rows, columns = tensor_shapes(checkpoint.config)[names[0]]
    values = torch.empty((len(names), rows, columns), device=device, dtype=FP8)
    scale = torch.empty((len(names), rows), device=device)
    for expert, name in enumerate(names):
        checkpoint.read(name, values[expert])
        checkpoint.read(scale_name(name), scale[expert].unsqueeze(-1))
    return QuantizedExperts(values, scale, products)


class TowerLoader:
    """The weights of a checkpoint's towers on `device`, in `dtype`.

    With `for_triton` (None: on CUDA) matrices keep the layout that Triton's kernels read, experts
    stacked; otherwise they are packed for a CPU's products. `products` is how routed experts in 8
    bits are multiplied; raises ConfigError for "fp8" if they are not in 8 bits.
    """

    def __init__(
        self,
        checkpoint: Tensors,
        device: torch.device,
        dtype: torch.dtype,
        for_triton: bool | None,
        products: ExpertProducts = "widened",
    ) -> None:
        check_expert_products(checkpoint, products)
        if products == "fp8":
            check_fp8_device(device)
        self.config: TwoTowerConfig = checkpoint.config
        self._checkpoint = checkpoint
        self._shapes = tensor_shapes(checkpoint.config)
        self._device = device
        self._dtype = dtype
        self._packs = not (device.type == "cuda" if for_triton is None else for_triton)
        self._products: ExpertProducts = products
        self._own = threading.local()
        self._by_shape: dict[tuple[int, ...], Tensor] = {}

    def tower(self, tower: str, head: str) -> TowerWeights:
        """The tower and its head by their names in the checkpoint. Raises CheckpointError, and
        ConfigError if they are larger than the free memory of the device."""
        self._check_room((f"{tower}.", f"{head}."))
        with threads_side_by_side() as threads:
            # The largest begin first.
            last = threads.submit(self._matrix, f"{head}.weight")
            embedding = threads.submit(self._read, f"{tower}.embeddings.weight")
            layers = [
                threads.submit(self._layer, kind, f"{tower}.layers.{index}")
                for index, kind in enumerate(self.config.layer_pattern)
            ]
            weights = TowerWeights(
                embedding.result(),
                tuple(layer.result() for layer in layers),
                self._read(f"{tower}.norm_f.weight"),
                last.result(),
            )
        self._try_single_rows()
        return weights

    def _layer(self, kind: str, prefix: str) -> LayerWeights:
        norm = self._read(f"{prefix}.norm.weight")
        return LayerWeights(kind, norm, self._mixer(kind, f"{prefix}.mixer"))

    def _try_single_rows(self) -> None:
        """Tries products that are tried once, with the threads that passes will have, so that the
        first step does not."""
        for weight in self._by_shape.values():
            try_single_row(weight)

    def _check_room(self, prefixes: tuple[str, ...]) -> None:
        """Raises ConfigError if tensors with these prefixes are larger than the free memory."""
        experts = expert_matrices(self.config) if self.config.quantized_experts else {}
        needed = 0
        for name, shape in self._shapes.items():
            if name.startswith(prefixes):
                width = 1 if name in experts and self._narrow else self._dtype.itemsize
                needed += math.prod(shape) * width
        free = free_bytes(self._device)
        if needed > free:
            raise ConfigError(
                f"memory: {free} bytes are free on {self._device}, expected at least {needed} for "
                f"the weights of {prefixes[0].rstrip('.')} in {str(self._dtype).split('.')[-1]}"
            )

    def timestep(self) -> TimestepWeights:
        """The denoiser's timestep embedding and the scale-shift tables of all layers."""
        tables = [f"scale_shift_tables.{index}" for index in range(self.config.num_layers)]
        weights = TimestepWeights(
            self._matrix("t_embedder.mlp.0.weight"),
            self._read("t_embedder.mlp.0.bias"),
            self._matrix("t_embedder.mlp.2.weight"),
            self._read("t_embedder.mlp.2.bias"),
            self._matrix("t_block.1.weight"),
            self._read("t_block.1.bias"),
            self._stacked(tables),
        )
        self._try_single_rows()
        return weights

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
            tap_major(self._read(f"{prefix}.conv1d.weight", shape=conv_shape)),
            self._optional(f"{prefix}.conv1d.bias"),
            self._read(f"{prefix}.A_log", wide),
            self._read(f"{prefix}.D", wide),
            self._read(f"{prefix}.dt_bias", wide),
            self._read(f"{prefix}.norm.weight"),
            self._matrix(f"{prefix}.out_proj.weight"),
            self._optional(f"{prefix}.out_proj.bias"),
        )

    def _moe(self, prefix: str) -> MoeWeights:
        if self.config.mlp_bias:
            raise CheckpointError("mlp_bias: got True, expected False in a model with MoE layers")
        experts = range(self.config.n_routed_experts)
        gate = self._read(f"{prefix}.gate.weight", torch.float64)
        narrow = not self._packs and self._dtype == torch.bfloat16
        return MoeWeights(
            gate,
            # fp32 in a bf16 model too: rounding it would change borderline choices of experts.
            self._read(f"{prefix}.gate.e_score_correction_bias", torch.float32),
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

    def _read(
        self, name: str, dtype: torch.dtype | None = None, shape: tuple[int, ...] | None = None
    ) -> Tensor:
        target = self._empty(shape or self._shapes[name], dtype)
        self._checkpoint.read(name, target)
        return target

    def _matrix(self, name: str) -> Tensor:
        return self._packed([name])

    def _packed(self, names: Sequence[str]) -> Tensor:
        """Matrices [N_i, K] concatenated to [sum of N_i, K], packed for a CPU."""
        if self._packs and len(names) == 1:
            lying = self._checkpoint.lying(names[0], self._dtype)
            if lying is not None:
                return self._kept(lying)
        shape = self._joined_shape(names)
        target = self._staging(shape) if self._packs else self._empty(shape, None)
        self._read_joined(names, target)
        return self._kept(target)

    def _kept(self, target: Tensor) -> Tensor:
        """The matrix to keep: for a CPU packed or copied out of where it is, or `target` itself."""
        if not self._packs:
            return target
        packed = pack(target)
        kept = target.clone() if packed is target else packed
        self._by_shape[tuple(kept.shape)] = kept
        return kept

    def _staging(self, shape: tuple[int, ...]) -> Tensor:
        """A buffer for a matrix until it is packed, reused for the thread's next matrix: thousands
        of short allocations between lasting ones would fragment memory by nearly the tower's size.
        Large ones come from the system and go back to it."""
        count = torch.Size(shape).numel()
        if count > _MOST_STAGED:
            return self._empty(shape, None)
        buffer: Tensor | None = getattr(self._own, "buffer", None)
        if buffer is None or buffer.numel() < count:
            self._own.buffer = buffer = self._empty((count,), None)
        return buffer[:count].view(shape)

    def _experts(self, names: Sequence[str]) -> ExpertWeights:
        quantized = self.config.quantized_experts
        if quantized and self._narrow:
            return read_quantized(self._checkpoint, names, self._device, self._products)
        if self._packs:
            return [self._widened(name) if quantized else self._matrix(name) for name in names]
        return self._stacked(names)

    @property
    def _narrow(self) -> bool:
        """True if experts that are stored in 8 bits stay in them."""
        return not self._packs or self._products == "fp8"

    def _widened(self, name: str) -> Tensor:
        """An 8-bit matrix converted to the working dtype: a CPU has no faster products of 8 bits.

        Every 8-bit value is exact in bf16 too, so that only the product with the scale rounds.
        """
        target = self._staging(self._shapes[name])
        self._checkpoint.read(name, target)
        target.mul_(self._read(scale_name(name), torch.float32))
        return self._kept(target)

    def _optional(self, name: str) -> Tensor | None:
        return self._read(name) if name in self._shapes else None

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
        """Reads tensors into consecutive rows of `target`, without a copy between."""
        sizes = [self._shapes[name][0] for name in names]
        for part, name in zip(target.split(sizes), names, strict=True):
            self._checkpoint.read(name, part)

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype | None) -> Tensor:
        return torch.empty(shape, device=self._device, dtype=dtype or self._dtype)
