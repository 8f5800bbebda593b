"""The program of the released model's card, and the recorded outputs of the released calls."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import twotower.transformers
from twotower import Request, TwoTower
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams
from twotower.transformers import SHIPPED_MODEL

PROMPT = "    def test_open(self):"
# As a user of the released model writes it; the import is all that is new.
PROGRAM = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import twotower.transformers

tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(
    name, torch_dtype=torch.bfloat16, trust_remote_code=True
)
model.place_towers_on_devices("cpu", "cpu")
model.eval()

input_ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
with torch.no_grad():
    diffusion = model.generate_mask_diffusion(
        input_ids,
        max_new_tokens=64,
        block_size=16,
        steps_per_block=16,
        mask_token_id=3,
        temperature=0.0,
        confidence_threshold=0.8,
        eos_token_id=tokenizer.eos_token_id,
    )
    mock_ar = model.generate_mock_ar(
        input_ids, max_new_tokens=24, temperature=0.0, eos_token_id=tokenizer.eos_token_id
    )
    ar = model.generate_ar(
        input_ids, max_new_tokens=24, temperature=0.0, eos_token_id=tokenizer.eos_token_id
    )
text = tokenizer.decode(diffusion[0], skip_special_tokens=True)
"""


def test_the_card_s_program_gives_the_tokens_of_generate() -> None:
    names: dict[str, Any] = {"name": str(SHIPPED_MODEL), "prompt": PROMPT}
    exec(compile(PROGRAM, "program", "exec"), names)
    model = TwoTower.from_pretrained(dtype="bfloat16")
    prompt = model.encode(PROMPT)
    for name, mode, count in [
        ("diffusion", "mask_diffusion", 64),
        ("mock_ar", "mock_ar", 24),
        ("ar", "ar", 24),
    ]:
        how = GenerationParams(
            mode=mode,  # type: ignore[arg-type]
            max_tokens=count,
            eos_token_id=2,
            commit_rule="released",
        )
        (alone,) = model.generate_requests([Request(prompt, how)])
        assert names[name].tolist() == [[*prompt, *alone.token_ids]], name
        assert names[name].dtype == torch.int64
        if mode == "mask_diffusion":
            assert names["text"] == PROMPT + alone.text


def test_the_released_defaults() -> None:
    kind = twotower.transformers.NemotronHTwoTowerForCausalLM
    stated = inspect.signature(kind.generate_mask_diffusion).parameters
    defaults = {name: stated[name].default for name in list(stated)[3:8]}
    assert defaults == {
        "block_size": 16,
        "steps_per_block": 16,
        "mask_token_id": 3,
        "temperature": 0.0,
        "confidence_threshold": 0.9,
    }
    for call in (kind.generate_mask_diffusion, kind.generate_ar, kind.generate_mock_ar):
        assert inspect.signature(call).parameters["eos_token_id"].default is None
        assert inspect.signature(call).parameters["temperature"].default == 0.0


def test_every_recorded_generation_comes_out_of_the_calls(folder: Path, auto_model: Any) -> None:
    """A recorded batch was coupled through a shared timestep: its rows alone are compared."""
    tensors = load_file(folder / "golden.safetensors")
    cases = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["cases"]
    seen = []
    for case in cases:
        if case["kind"] not in ("mask_diffusion", "ar", "mock_ar"):
            continue
        prompt, eos = tensors[f"{case['id']}/prompt"], case["info"].get("eos_token_id")
        whole = tensors[f"{case['id']}/output"]
        alone = [tensors.get(f"{case['id']}/alone.{row}.output") for row in range(len(whole))]
        got = _call(auto_model, case, prompt, eos)
        for row, recorded in enumerate(whole):
            expected = (recorded if alone[row] is None else alone[row].flatten()).tolist()
            assert got[row].tolist() == _up_to_eos(expected, prompt.shape[1], eos), case["id"]
        seen.append(case["id"])
    assert {"md_g09", "md_eos", "md_b2", "ar_24", "ar_eos", "mock_24"} <= set(seen)


def _call(model: Any, case: dict[str, Any], prompt: torch.Tensor, eos: int | None) -> torch.Tensor:
    common = {"max_new_tokens": case["max_new_tokens"], "eos_token_id": eos}
    if case["kind"] == "mask_diffusion":
        return model.generate_mask_diffusion(  # type: ignore[no-any-return]
            prompt,
            block_size=case["block"],
            steps_per_block=case["steps"],
            mask_token_id=3,
            confidence_threshold=case["gamma"],
            **common,
        )
    return getattr(model, f"generate_{case['kind']}")(prompt, **common)  # type: ignore[no-any-return]


def _up_to_eos(tokens: list[int], prompt: int, eos: int | None) -> list[int]:
    """A sequence up to the first EOS of its output; the release goes on to the end of a block."""
    new = tokens[prompt:]
    return tokens[: prompt + new.index(eos) + 1] if eos in new else tokens


def test_rows_end_at_their_own_eos_and_are_padded(tiny_a: Path) -> None:
    """EOS is a token that the first row's output has, and the second's has later."""
    model = twotower.transformers.NemotronHTwoTowerForCausalLM.from_pretrained(
        tiny_a, dtype="float32"
    )
    prompts = torch.tensor([[5, 3, 17, 9], [8, 44, 2, 160]])
    free = model.generate_mask_diffusion(prompts, max_new_tokens=24, confidence_threshold=0.8)
    assert free.shape == (2, 28)
    eos = int(free[0, 4 + 9])
    first, second = (row[4:].tolist() for row in free)
    assert eos not in second
    ended = model.generate_mask_diffusion(
        prompts, max_new_tokens=24, confidence_threshold=0.8, eos_token_id=eos, pad_token_id=7
    )
    length = first.index(eos) + 1
    assert ended[0].tolist() == [*prompts[0].tolist(), *first[:length], *[7] * (24 - length)]
    assert ended[1].tolist() == free[1].tolist()


@pytest.mark.parametrize("call", ["generate_mask_diffusion", "generate_ar", "generate_mock_ar"])
def test_padding_of_a_prompt_is_no_part_of_its_row(auto_model: Any, call: str) -> None:
    generate = getattr(auto_model, call)
    alone = generate(torch.tensor([[9, 12, 80]]), max_new_tokens=10)[0, 3:].tolist()
    ids = torch.tensor([[0, 0, 9, 12, 80], [9, 12, 80, 0, 0], [4, 5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    padded = generate(ids, max_new_tokens=10, attention_mask=mask)
    assert padded.shape == (3, 15)
    assert padded[:, :5].equal(ids)
    assert padded[0, 5:].tolist() == alone
    assert padded[1, 5:].tolist() == alone
    assert padded[2, 5:].tolist() == generate(ids[2:], max_new_tokens=10)[0, 5:].tolist()


def test_what_the_release_cannot_do(auto_model: Any) -> None:
    """Prompts of one token, and lengths that are no multiple of the block."""
    assert auto_model.generate_mask_diffusion(torch.tensor([[6]]), max_new_tokens=5).shape == (1, 6)
    assert auto_model.generate_mock_ar(torch.tensor([[6]]), max_new_tokens=5).shape == (1, 6)


def test_draws_follow_torch_s_seed_or_the_call_s(auto_model: Any) -> None:
    prompt = torch.tensor([[4, 5, 6]])

    def drawn(**arguments: Any) -> list[int]:
        out = auto_model.generate_ar(prompt, max_new_tokens=12, temperature=1.0, **arguments)
        return out[0].tolist()  # type: ignore[no-any-return]

    torch.manual_seed(1)
    first, second = drawn(), drawn()
    torch.manual_seed(1)
    assert drawn() == first != second
    assert drawn(seed=3) == drawn(seed=3) != drawn(seed=4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_token_id": 4}, "mask_token_id: got 4, expected 3, the token that"),
        ({"block_size": 0}, "block_size: got 0"),
        ({"confidence_threshold": 1.5}, "confidence_threshold: got 1.5"),
        ({"max_new_tokens": 0}, "max_tokens: got 0"),
        ({"eos_token_id": "no"}, "eos_token_id: got 'no', expected a token id"),
        ({"attention_mask": torch.ones(1, 2)}, "attention_mask: got 'torch.float32 of shape"),
        ({"attention_mask": torch.ones(1, 9, dtype=torch.int64)}, "attention_mask: got 'shape"),
        ({"attention_mask": torch.zeros(1, 2, dtype=torch.int64)}, r"prompt: got \[\]"),
    ],
)
def test_bad_arguments_are_refused(auto_model: Any, arguments: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        auto_model.generate_mask_diffusion(torch.tensor([[4, 5]]), **arguments)


@pytest.mark.parametrize("ids", [[[4, 5]], torch.tensor([4, 5]), torch.tensor([[0.5]]), None])
def test_ids_have_to_be_a_batch(auto_model: Any, ids: Any) -> None:
    with pytest.raises(InvalidRequestError, match=r"^input_ids: got"):
        auto_model.generate_mask_diffusion(ids)


def test_an_unknown_argument_is_refused_by_name(auto_model: Any) -> None:
    with pytest.raises(TypeError, match="'steps'"):
        auto_model.generate_mask_diffusion(torch.tensor([[4, 5]]), steps=4)
