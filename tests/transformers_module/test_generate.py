"""`generate` as ordinary programs and pipelines call it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from twotower import Request, TwoTower
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams

PROMPT = "    def test_open(self):"
IDS = torch.tensor([[5, 3, 17, 3, 9]])


def new(model: Any, ids: torch.Tensor = IDS, **arguments: Any) -> list[int]:
    """The new tokens of the first row; a BOS token and EOS play no part."""
    out = model.generate(ids, **{"eos_token_id": None, **arguments})
    return out[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        ({}, {"mode": "ar"}),
        ({"mode": "mask_diffusion"}, {"mode": "mask_diffusion"}),
        ({"mode": "mock_ar"}, {"mode": "mock_ar"}),
        (
            {"mode": "mask_diffusion", "block_size": 8, "steps_per_block": 3, "mask_token_id": 3},
            {"mode": "mask_diffusion", "block_size": 8, "steps_per_block": 3},
        ),
        (
            {"mode": "verified", "draft_steps": 2, "confidence_threshold": 0.5},
            {"mode": "verified", "draft_steps": 2, "confidence_threshold": 0.5},
        ),
        (
            {"mode": "verified", "draft_source": "denoiser", "acceptance": "mix", "mix_ratio": 0.9},
            {"mode": "verified", "draft_source": "denoiser", "acceptance": "mix", "mix_ratio": 0.9},
        ),
        (
            {"mode": "mask_diffusion", "commit_rule": "product", "first_token": "context"},
            {"mode": "mask_diffusion", "commit_rule": "product", "first_token": "context"},
        ),
        ({"mode": "auto"}, {"mode": "ar"}),
        (
            {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 6},
            {"mode": "ar", "temperature": 0.7, "top_k": 40, "top_p": 0.9, "seed": 6},
        ),
        (
            {"do_sample": True, "top_k": 0, "min_p": 0.1, "seed": 6},
            {"mode": "ar", "temperature": 1.0, "min_p": 0.1, "seed": 6},
        ),
    ],
)
def test_the_tokens_are_those_of_this_package(
    auto_model: Any, model: TwoTower, arguments: dict[str, Any], own: dict[str, Any]
) -> None:
    """In mask_diffusion they are those of the released commit rule, unless another is asked for."""
    params = GenerationParams(**{"max_tokens": 24, "commit_rule": "released"} | own)
    (alone,) = model.generate_requests([Request(IDS[0].tolist(), params)])
    assert new(auto_model, max_new_tokens=24, **arguments) == alone.token_ids


def test_lengths(auto_model: Any) -> None:
    assert len(new(auto_model)) == 20
    assert len(new(auto_model, max_length=12)) == 7
    assert len(new(auto_model, max_length=12, max_new_tokens=3)) == 3
    config = GenerationConfig(max_new_tokens=4)
    assert len(new(auto_model, generation_config=config)) == 4
    assert len(new(auto_model, generation_config=config, max_length=11)) == 6
    with pytest.raises(InvalidRequestError, match=r"^max_length: got 5, expected more than the 5"):
        new(auto_model, max_length=5)


def test_eos_is_the_checkpoint_s_unless_the_call_says_otherwise(auto_model: Any) -> None:
    tokens = new(auto_model, max_new_tokens=24)
    eos, later = tokens[4], next(t for t in tokens if t not in tokens[:5])
    assert new(auto_model, max_new_tokens=24, eos_token_id=eos) == tokens[: tokens.index(eos) + 1]
    several = new(auto_model, max_new_tokens=24, eos_token_id=[later, eos])
    assert several == tokens[: tokens.index(eos) + 1]
    put_off = new(auto_model, max_new_tokens=24, eos_token_id=eos, min_new_tokens=12)
    assert len(put_off) >= 12
    assert eos not in put_off[:11]
    with pytest.raises(InvalidRequestError, match=r"^min_new_tokens: got 12, expected 0 where"):
        new(auto_model, eos_token_id=[eos, later], min_new_tokens=12)
    auto_model.generation_config.eos_token_id = eos
    try:
        out = auto_model.generate(IDS, max_new_tokens=24)
    finally:
        auto_model.generation_config.eos_token_id = 2
    assert out[0, 5:].tolist() == tokens[: tokens.index(eos) + 1]


def test_a_batch_gives_what_its_rows_give_alone(shipped: Any, tokenizer: Any) -> None:
    texts = [PROMPT, "import os\nimport", "class A:\n    def"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = shipped.generate(**batch, max_new_tokens=12)
    assert out.shape == (3, batch.input_ids.shape[1] + 12)
    for row, text in zip(out, texts, strict=True):
        single = tokenizer(text, return_tensors="pt")
        alone = shipped.generate(**single, max_new_tokens=12)[0]
        assert tokenizer.decode(row, skip_special_tokens=True) == tokenizer.decode(
            alone, skip_special_tokens=True
        )


def test_without_a_prompt_a_row_begins_with_bos(auto_model: Any) -> None:
    out = auto_model.generate(max_new_tokens=3)
    assert out.tolist() == auto_model.generate(torch.tensor([[1]]), max_new_tokens=3).tolist()


class Stops(StoppingCriteria):
    """Ends each row at its own length; keeps what it was shown."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = torch.tensor(lengths)
        self.shown: list[list[list[int]]] = []

    def __call__(self, input_ids: torch.Tensor, _scores: Any, **_kwargs: Any) -> torch.Tensor:
        self.shown.append(input_ids.tolist())
        return input_ids.shape[1] >= self.lengths


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion", "verified"])
def test_criteria_see_every_token_and_end_rows(auto_model: Any, mode: str) -> None:
    ids = torch.tensor([[5, 3, 17], [7, 8, 9]])
    whole = auto_model.generate(ids, max_new_tokens=20, mode=mode, eos_token_id=None).tolist()
    criteria = Stops(6, 8)
    out = auto_model.generate(
        ids,
        max_new_tokens=20,
        mode=mode,
        eos_token_id=None,
        pad_token_id=0,
        stopping_criteria=StoppingCriteriaList([criteria]),
    ).tolist()
    assert out == [[*whole[0][:6], 0, 0], whole[1][:8]]
    assert criteria.shown[:3] == [[row[:n] for row in whole] for n in (4, 5, 6)]
    assert len(criteria.shown) == 5


def test_a_criterion_that_answers_for_the_whole_batch(auto_model: Any) -> None:
    """As lm-eval's do."""
    whole = new(auto_model, max_new_tokens=20)
    out = new(auto_model, max_new_tokens=20, stopping_criteria=[lambda ids, _: ids.shape[1] > 8])
    assert out == whole[:4]
    assert new(auto_model, stopping_criteria=MaxLengthCriteria(7), max_new_tokens=9) == whole[:2]
    assert new(auto_model, stopping_criteria=StoppingCriteriaList(), max_new_tokens=9) == whole[:9]


def test_a_criterion_that_fails_frees_the_rows(auto_model: Any) -> None:
    def fails(_ids: torch.Tensor, _scores: Any) -> bool:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        auto_model.generate(IDS, max_new_tokens=64, stopping_criteria=[fails])
    pool = auto_model._towers.loaded()._context.pool
    assert pool.slots_used == 0


def test_a_row_that_a_criterion_ends_is_free_at_once(auto_model: Any) -> None:
    pool = auto_model._towers.loaded()._context.pool
    held: list[int] = []

    def first_row_ends(ids: torch.Tensor, _scores: Any) -> torch.Tensor:
        held.append(pool.slots_used)
        return torch.tensor([True, ids.shape[1] > 8])

    prompts = torch.tensor([[5, 3, 17], [7, 8, 9]])
    auto_model.generate(
        prompts, max_new_tokens=500, eos_token_id=None, stopping_criteria=[first_row_ends]
    )
    assert held == [2, 1, 1, 1, 1, 1]


def test_stop_strings_end_the_output_after_them(shipped: Any, tokenizer: Any) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    for stop in ("\n", ["\n", "nothing of the kind"]):
        out = shipped.generate(**inputs, max_new_tokens=64, stop_strings=stop, tokenizer=tokenizer)
        new_text = tokenizer.decode(out[0, inputs.input_ids.shape[1] :])
        assert "\n" in new_text
        assert "\n" not in new_text[: new_text.index("\n")]
        assert out.shape[1] < inputs.input_ids.shape[1] + 64


def test_streamers_get_the_tokens(
    shipped: Any, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = tokenizer(PROMPT, return_tensors="pt")
    want = tokenizer.decode(shipped.generate(**inputs, max_new_tokens=16)[0])
    shipped.generate(**inputs, max_new_tokens=16, streamer=TextStreamer(tokenizer))
    assert capsys.readouterr().out == want + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    shipped.generate(**inputs, max_new_tokens=16, mode="mask_diffusion", streamer=streamer)
    diffused = shipped.generate(**inputs, max_new_tokens=16, mode="mask_diffusion")
    assert "".join(streamer) == tokenizer.decode(diffused[0, inputs.input_ids.shape[1] :])


def test_the_text_generation_pipeline(shipped: Any, tokenizer: Any) -> None:
    complete = pipeline("text-generation", model=shipped, tokenizer=tokenizer)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    want = tokenizer.decode(shipped.generate(**inputs, max_new_tokens=16)[0])
    (found,) = complete(PROMPT, max_new_tokens=16, do_sample=False)
    assert found == {"generated_text": want}
    torch.manual_seed(2)
    sampled = complete([PROMPT, "import os"], max_new_tokens=8, batch_size=2)
    assert [texts[0]["generated_text"].startswith("    def") for texts in sampled] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_beams": 4}, "num_beams: got 4, expected None or 1"),
        ({"num_return_sequences": 2}, "num_return_sequences: got 2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty: got 1.2"),
        ({"logits_processor": [print]}, "logits_processor: got"),
        ({"past_key_values": (1,)}, "past_key_values: got"),
        ({"output_attentions": True}, "output_attentions: got True"),
        ({"output_scores": True}, "output_scores: got True"),
        ({"return_dict_in_generate": True}, "return_dict_in_generate: got True"),
        ({"assistant_model": "other"}, "assistant_model: got"),
        ({"max_time": 3.0}, "max_time: got"),
        ({"inputs_embeds": torch.ones(1, 2, 3)}, "inputs_embeds: got"),
        ({"bad_words_ids": [[4]]}, "bad_words_ids: got"),
        ({"no_such": 1}, "no_such: got 1, expected no such argument"),
        ({"mode": "beam"}, "mode: got 'beam', expected one of"),
        ({"temperature": 0.7}, "temperature: got 0.7, expected none without do_sample=True"),
        ({"top_p": 0.7, "do_sample": False}, "top_p: got 0.7, expected none without"),
        ({"block_size": 8}, "block_size: got 8, expected none in mode ar"),
        (
            {"mode": "verified", "quality": "near"},
            "quality: got 'near', expected none in mode verified",
        ),
        (
            {"mode": "auto", "acceptance": "mix"},
            "acceptance: got 'mix', expected none in mode auto",
        ),
        ({"steps_per_block": 8, "mode": "verified"}, "steps_per_block: got 8, expected none in"),
        ({"mask_token_id": 7, "mode": "mask_diffusion"}, "mask_token_id: got 7, expected 3"),
        ({"generation_config": GenerationConfig(num_beams=3)}, "num_beams: got 3"),
        ({"input_ids": IDS}, "inputs: got 'ids', expected none beside input_ids"),
        ({"stop_strings": "a"}, "stop: got"),
        ({"eos_token_id": [True]}, "eos_token_id: got"),
        ({"max_new_tokens": 2.5}, "max_tokens: got 2.5"),
        ({"seed": -1}, "seed: got -1"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    auto_model: Any, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=f"^{message}"):
        auto_model.generate(IDS, **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 1, "use_cache": True, "synced_gpus": False},
        {"repetition_penalty": 1.0, "logits_processor": None, "output_scores": False},
        {"temperature": 1.0, "top_p": 1.0, "do_sample": False},
        {"generation_config": GenerationConfig(temperature=0.7, top_k=50, do_sample=False)},
    ],
)
def test_what_asks_for_nothing_is_taken(auto_model: Any, arguments: dict[str, Any]) -> None:
    want = auto_model.generate(IDS).tolist()
    assert auto_model.generate(IDS, **arguments).tolist() == want
