"""Errors of MoE outputs: none between a model and itself, some after quantization."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quantization import output_errors
from twotower.towers.checkpoint.quantization import quantize_checkpoint


def test_errors_by_layer(tiny_a: Path, tmp_path: Path) -> None:
    texts = [[5 + i % 40 for i in range(20)], [7, 8, 9], [60 - i for i in range(33)]]
    assert output_errors(tiny_a, tiny_a, texts) == {"1": 0.0, "4": 0.0, "6": 0.0, "9": 0.0}
    quantize_checkpoint(tiny_a, tmp_path / "quantized")
    errors = output_errors(tiny_a, tmp_path / "quantized", texts)
    assert errors.keys() == {"1", "4", "6", "9"}
    # Three bits behind the point give 2 to 3 percent per matrix, and relu squared doubles one.
    assert all(0.0 < error < 0.12 for error in errors.values()), errors
