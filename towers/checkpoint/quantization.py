"""Quantizes the routed experts of a checkpoint to 8 bits.

Only routed experts change (nine tenths of a large model's bytes): their up and down matrices
become float8 e4m3 with an fp32 scale per output channel. All other tensors keep their bytes:
with quantized heads, attention, Mamba layers or timestep network the denoiser has been seen to
commit fewer tokens per pass.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from twotower.kernels.quantized import QuantizedExperts, quantize
from twotower.towers.checkpoint.checkpoint import (
    FP8_NAME,
    INDEX_FILE,
    Checkpoint,
    ExpertSide,
    ReadProgress,
    expert_matrices,
    scale_name,
    tensor_shapes,
)
from twotower.towers.checkpoint.tensor_file import StoredTensor, TensorFile
from twotower.towers.config import quantization_config
from twotower.towers.errors import CheckpointError

_CONFIG_FILE = "config.json"
_SIDES = ("up_proj", "down_proj")
# Weights in other formats are those of the unquantized model.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".onnx", ".index.json")


@dataclass(frozen=True)
class LayerError:
    """Relative RMS error of an MoE layer's routed experts: the root mean square of the change over
    that of the weights, of all experts together, for up and down matrices."""

    tower: str
    layer: int
    up: float
    down: float


@dataclass(frozen=True)
class QuantizationReport:
    """Relative RMS errors by layer, and bytes of all tensors before and after."""

    layers: tuple[LayerError, ...]
    bytes_before: int
    bytes_after: int

    def table(self) -> str:
        """The report as text: a line per layer, and the sizes."""
        lines = [f"{'tower':<16}{'layer':>5}{'up':>10}{'down':>10}   relative RMS error"]
        for error in self.layers:
            lines.append(f"{error.tower:<16}{error.layer:>5}{error.up:>10.5f}{error.down:>10.5f}")
        share = self.bytes_after / self.bytes_before
        lines.append(
            f"{self.bytes_before:,} bytes before, {self.bytes_after:,} after ({share:.3f})"
        )
        return "\n".join(lines)


@dataclass
class _Sums:
    """Sums of squares of errors and weights so far, by tower, layer and side; bytes so far."""

    error: dict[ExpertSide, float] = field(default_factory=dict)
    weight: dict[ExpertSide, float] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def add(self, side: ExpertSide, weight: Tensor, quantized: QuantizedExperts) -> None:
        """Adds an expert's weight [N, K] and its quantized form [1, N, K]."""
        wide = weight.float()
        self.error[side] = self.error.get(side, 0.0) + _square(quantized[0] - wide)
        self.weight[side] = self.weight.get(side, 0.0) + _square(wide)

    def report(self) -> QuantizationReport:
        """The errors of all layers added so far."""
        errors = [
            LayerError(tower, layer, *(self._relative((tower, layer, side)) for side in _SIDES))
            for tower, layer in sorted({side[:2] for side in self.error})
        ]
        return QuantizationReport(tuple(errors), self.bytes_before, self.bytes_after)

    def _relative(self, side: ExpertSide) -> float:
        """Relative RMS error of a layer's up or down matrices; 0 for matrices of zeros."""
        return float((self.error[side] / self.weight[side]) ** 0.5) if self.weight[side] else 0.0


def quantize_checkpoint(
    source: Path, target: Path, progress: ReadProgress | None = None
) -> QuantizationReport:
    """Writes the checkpoint in `source` to the new folder `target`, routed experts in 8 bits.

    Files keep their names; a single tensor at a time is in memory. `target` appears when it is
    complete. `progress` gets the bytes read so far and those of all tensors. Raises CheckpointError
    for a `target` that is not empty, and for a checkpoint that is quantized already, has no MoE
    layer or holds values that are not finite.
    """
    checkpoint = Checkpoint(source)
    if checkpoint.config.quantized_experts:
        raise CheckpointError(f"{source}: its routed experts are quantized already")
    if not expert_matrices(checkpoint.config):
        raise CheckpointError(
            f"hybrid_override_pattern: got {checkpoint.config.layer_pattern!r}, expected at least "
            "one MoE layer ('E'): only routed experts are quantized"
        )
    checkpoint.watch(tensor_shapes(checkpoint.config), progress)
    with _replacing(target) as folder:
        report = _write_tensors(checkpoint, folder)
        _write_config(source, folder)
        _copy_others(source, folder)
    return report


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A folder next to `target`, renamed to it at the end, or removed after an error."""
    target = target.resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target}: exists already, expected a new or an empty folder")
    folder = target.parent / f".{target.name}.partial"
    if not target.parent.is_dir() and target.parent.exists():
        raise CheckpointError(f"{target.parent}: is a file, expected a folder")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
    except FileExistsError:
        raise CheckpointError(
            f"{folder}: exists already; another run is writing {target}, or one was killed and "
            "this is what it left, to be removed"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        yield folder
        folder.rename(target)
    except OSError as error:
        raise CheckpointError(f"{error.filename or target}: {error.strerror}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write_tensors(checkpoint: Checkpoint, folder: Path) -> QuantizationReport:
    """Writes all files of tensors, and an index if the source has one."""
    sums = _Sums()
    weight_map: dict[str, str] = {}
    for path, names in checkpoint.names_by_file.items():
        weight_map |= dict.fromkeys(
            _write_file(checkpoint, names, folder / path.name, sums), path.name
        )
    if (checkpoint.folder / INDEX_FILE).exists():
        index = {"metadata": {"total_size": sums.bytes_after}, "weight_map": weight_map}
        _write_json(folder / INDEX_FILE, index)
    return sums.report()


def _write_file(checkpoint: Checkpoint, names: list[str], path: Path, sums: _Sums) -> list[str]:
    """Writes the tensors `names` of a source file, scales added; returns all names written."""
    sides = expert_matrices(checkpoint.config)
    shapes = tensor_shapes(checkpoint.config)
    layout: dict[str, StoredTensor] = {}
    for name in names:
        before = StoredTensor(checkpoint.dtype_name(name), shapes[name])
        sums.bytes_before += before.size
        if name in sides:
            layout[name] = StoredTensor(FP8_NAME, before.shape)
            layout[scale_name(name)] = StoredTensor("F32", (before.shape[0], 1))
        else:
            layout[checkpoint.name_in_file(name)] = before
    sums.bytes_after += sum(stored.size for stored in layout.values())
    with TensorFile(path, layout) as file:
        for name in names:
            tensor = checkpoint.read_stored(name)
            if name in sides:
                quantized = _quantize(name, tensor)
                sums.add(sides[name], tensor, quantized)
                file.write(name, quantized.values[0])
                file.write(scale_name(name), quantized.scale[0])
            else:
                file.write(checkpoint.name_in_file(name), tensor)
    return list(layout)


def _quantize(name: str, weight: Tensor) -> QuantizedExperts:
    try:
        return quantize(weight.unsqueeze(0))
    except ValueError as error:
        raise CheckpointError(f"{name}: {error}") from None


def _square(values: Tensor) -> float:
    """The sum of squares, in fp64."""
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2


def _write_config(source: Path, folder: Path) -> None:
    """Writes the source's config.json with the key of the quantization added."""
    raw = json.loads((source / _CONFIG_FILE).read_text(encoding="utf-8"))
    _write_json(
        folder / _CONFIG_FILE, raw | {quantization_config.KEY: quantization_config.FP8_EXPERTS}
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _copy_others(source: Path, folder: Path) -> None:
    """Copies all other files: tokenizer, model card and the like."""
    for path in sorted(source.iterdir()):
        written = path.name == _CONFIG_FILE or path.name.endswith(_OTHER_WEIGHTS)
        if path.is_file() and not written:
            shutil.copyfile(path, folder / path.name)
