"""`forward`: the context tower's logits, whatever the padding, and the loss of labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from twotower import TwoTower
from twotower.towers.errors import InvalidRequestError
from twotower.towers.verify.report import LOGIT_TOLERANCE

TEXT = "import os\nimport sys\n\n\ndef main(argv=None):\n"


@pytest.mark.parametrize("case", ["prefill_1", "prefill_7", "prefill_33"])
def test_logits_are_those_recorded_of_the_reference(
    folder: Path, auto_model: Any, case: str
) -> None:
    tensors = load_file(folder / "golden.safetensors")
    logits = auto_model(tensors[f"{case}/tokens"]).logits
    torch.testing.assert_close(
        logits, tensors[f"{case}/logits_all"], atol=LOGIT_TOLERANCE, rtol=0.0
    )


def test_hidden_tokens_are_not_read(auto_model: Any) -> None:
    alone = auto_model(torch.tensor([[9, 12, 80]])).logits[0]
    ids = torch.tensor([[0, 0, 9, 12, 80], [9, 12, 80, 0, 0], [9, 0, 12, 0, 80]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]])
    logits = auto_model(ids, attention_mask=mask).logits
    for row, kept in zip(logits, mask.bool(), strict=True):
        assert row[kept].equal(alone)
        assert not row[~kept].any()


def test_the_loss_is_the_mean_of_the_scores(shipped: Any, shipped_alone: TwoTower) -> None:
    ids = shipped_alone.encode(TEXT)
    scores = shipped_alone.score(ids)
    row = torch.tensor([ids])
    assert shipped(row, labels=row).loss.item() == pytest.approx(-sum(scores) / len(scores))
    # A prompt's labels are left out by -100, padding by its mask.
    labels = row.clone()
    labels[:, :4] = -100
    want = -sum(scores[3:]) / len(scores[3:])
    assert shipped(row, labels=labels).loss.item() == pytest.approx(want)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.int64), row], dim=1)
    mask = (torch.arange(left.shape[1]) >= 3).long()[None]
    loss = shipped(left, attention_mask=mask, labels=left).loss.item()
    assert loss == pytest.approx(-sum(scores) / len(scores))


def test_the_last_logits_alone(auto_model: Any) -> None:
    ids = torch.tensor([[9, 12, 80, 4]])
    assert auto_model(ids, logits_to_keep=2).logits.equal(auto_model(ids).logits[:, -2:])


def test_logits_can_be_changed_and_differentiated_through(auto_model: Any) -> None:
    """They are no tensors of an inference mode."""
    logits = auto_model(torch.tensor([[9, 12]])).logits
    logits += 1.0
    scale = torch.ones(1, requires_grad=True)
    (logits * scale).sum().backward()
    assert scale.grad is not None


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"output_attentions": True}, "output_attentions"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"past_key_values": (1,)}, "past_key_values"),
        ({"inputs_embeds": torch.ones(1, 2, 4)}, "inputs_embeds"),
        ({"position_ids": torch.ones(1, 2)}, "position_ids"),
        ({"return_dict": False}, "return_dict"),
        ({"labels": torch.tensor([[1]])}, "labels"),
        ({"logits_to_keep": -1}, "logits_to_keep"),
        ({"nonsense": 1}, "nonsense"),
    ],
)
def test_what_forward_has_not_is_refused_by_name(
    auto_model: Any, arguments: Any, name: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{name}: got"):
        auto_model(torch.tensor([[9, 12]]), **arguments)


def test_more_tokens_than_the_context_holds(auto_model: Any) -> None:
    with pytest.raises(InvalidRequestError, match="at most"):
        auto_model(torch.ones(1, 4099, dtype=torch.int64))
