"""Errors of MoE outputs: none between a model and itself, some after quantization."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.quantization import denoiser_loss, output_errors
from twotower.kernels.quantized import EXPERT_PRODUCTS
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower


def test_errors_by_layer(tiny_a: Path, tmp_path: Path) -> None:
    texts = [[5 + i % 40 for i in range(20)], [7, 8, 9], [60 - i for i in range(33)]]
    assert output_errors(tiny_a, tiny_a, texts) == {"1": 0.0, "4": 0.0, "6": 0.0, "9": 0.0}
    quantize_checkpoint(tiny_a, tmp_path / "quantized")
    errors = output_errors(tiny_a, tmp_path / "quantized", texts)
    assert errors.keys() == {"1", "4", "6", "9"}
    # Three bits behind the point give 2 to 3 percent per matrix, and relu squared doubles one.
    assert all(0.0 < error < 0.12 for error in errors.values()), errors
    narrow = output_errors(tiny_a, tmp_path / "quantized", texts, "fp8")
    assert all(errors[layer] != narrow[layer] < 0.2 for layer in errors), narrow


def test_each_half_of_the_last_block_is_scored_once(tiny_a: Path, tmp_path: Path) -> None:
    text = [60 - i for i in range(33)]
    context, denoiser = load_context_tower(tiny_a), load_denoiser_tower(tiny_a)
    mask, state = denoiser.config.mask_token_id, context.new_state(33)
    context.forward([text[:17]], [state])
    context.advance(state, 17)
    total = 0.0
    for half in (0, 1):
        draft = [mask if i % 2 == half else token for i, token in enumerate(text[17:])]
        logits = denoiser.logits(denoiser.forward([draft], [0.5], [state])).double()
        for i in range(half, 16, 2):
            total -= float(logits[i, text[17 + i]] - logits[i].logsumexp(0))
    # The second is too short to have a context.
    assert denoiser_loss(tiny_a, [text, [7, 8, 9]]) == pytest.approx(total / 16, rel=1e-5)
    quantize_checkpoint(tiny_a, tmp_path / "quantized")
    others = [denoiser_loss(tmp_path / "quantized", [text], name) for name in EXPERT_PRODUCTS]
    assert len({*others, total / 16}) == 3
    assert others == pytest.approx([total / 16] * 2, rel=0.05)
