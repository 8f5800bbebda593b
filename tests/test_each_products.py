"""The same promises on every kind of processor: recorded cases, a row's bits in a batch, a step of
training. `pytest --products=plain` runs everything else so too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.comparing import assert_relative_rms, normal
from tests.towers.engine.test_batching_bits import mixed_requests
from tests.towers.test_training import TINY, TINY_SHAPE, random_parameters
from twotower import TwoTower
from twotower.kernels.products import Products
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.checkpoint.weights import load_context_tower
from twotower.towers.training.losses import Objective, context_loss
from twotower.towers.training.model import cast_parameters
from twotower.towers.training.optimizer import newton_schulz
from twotower.towers.training.options import TrainingOptions
from twotower.towers.verify import verify_folder

pytestmark = pytest.mark.usefixtures("each_products")


@pytest.fixture(scope="session")
def narrow(tiny_a: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded model with its routed experts in 8 bits."""
    target = tmp_path_factory.mktemp("narrow") / "model"
    quantize_checkpoint(tiny_a, target)
    return target


def test_the_recorded_cases_hold(folder: Path) -> None:
    lines: list[str] = []
    assert verify_folder(folder, report=lines.append), lines


def test_bf16_logits_are_near_the_recorded_ones(folder: Path) -> None:
    golden = load_file(folder / "golden.safetensors")
    tower = load_context_tower(folder, dtype=torch.bfloat16)
    cases = [name for name in golden if name.startswith("prefill") and "logits_all" in name]
    assert len(cases) >= 6
    got = []
    for case in cases:
        tokens = golden[case.replace("logits_all", "tokens")][0].tolist()
        logits = tower.logits(tower.forward([tokens], [tower.new_state(len(tokens))]))
        assert logits.dtype == torch.bfloat16
        got.append(logits.float())
    # Some choices of experts differ, the same on every kind of processor.
    assert_relative_rms(torch.cat(got), torch.cat([golden[case][0] for case in cases]), 0.15)


# Experts in 8 bits are multiplied in the model's dtype, so that this has all products of both.
@pytest.mark.parametrize(("dtype", "experts"), [("float32", "as they are"), ("bfloat16", "8 bits")])
def test_a_row_in_a_batch_has_the_bits_that_it_has_alone(
    dtype: str, experts: str, tiny_a: Path, narrow: Path
) -> None:
    model = TwoTower.from_pretrained(narrow if experts == "8 bits" else tiny_a, dtype=dtype)
    # Every mode, greedy and drawn.
    requests = mixed_requests(model.config.vocab_size)[1:8]
    together = model.generate_requests(requests)
    for request, joint in zip(requests, together, strict=True):
        (alone,) = model.generate_requests([request])
        assert len(joint.token_ids) == request.params.max_tokens
        for field in ("token_ids", "commit_steps", "confidences", "log_probs"):
            got, want = ([getattr(b, field) for b in r.blocks] for r in (joint, alone))
            assert got == want, f"{request.params.mode}: {field}"


def test_a_step_of_training_in_bf16_is_near_that_in_fp32() -> None:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, TINY.vocab_size, (4, TINY_SHAPE.length + 1), generator=generator)
    objective = Objective(TINY, TINY_SHAPE)
    losses, gradients = [], []
    for dtype in (torch.float32, torch.bfloat16):
        params = {name: value.requires_grad_() for name, value in random_parameters().items()}
        loss = context_loss(objective, cast_parameters(params, dtype), tokens)
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append(params["context_tower.embeddings.weight"].grad)
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)
    assert_relative_rms(gradients[1], gradients[0], 0.1)


def test_training_takes_what_the_processor_multiplies_faster(each_products: Products) -> None:
    fastest = "bfloat16" if each_products == "onednn" else "float32"
    assert TrainingOptions(Path("out"), Path("work")).dtype == fastest
    matrices = normal(3, 24, 40)
    update = newton_schulz(matrices, 5)
    assert str(update.dtype) == f"torch.{fastest}"
    values = torch.linalg.svdvals(update.float())
    assert 0.6 < values.min() <= values.max() < 1.3
    # The singular vectors stay, so that the product with the matrices is symmetric.
    product = update.float() @ matrices.mT
    assert_relative_rms(product.mT, product, 5e-2)
