"""The public Python API: names, signatures and what a result holds."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

import twotower
from tests.conftest import Engines
from tests.support.tokenizer_families import llama, saved, word_level
from twotower import GenerationParams, GenerationResult, Request, TwoTower
from twotower.towers.checkpoint.quantization import quantize_checkpoint
from twotower.towers.errors import CheckpointError, ConfigError, InvalidRequestError
from twotower.towers.text.tokenizer import load_tokenizer

PROMPT = [5, 3, 17, 3, 9]
MODES: list[Any] = ["mask_diffusion", "ar", "mock_ar", "verified", "auto"]


# Parameters of drafts and of how they are committed.
OF_DRAFTS = [
    ("quality", "ar"),
    ("draft_source", "any"),
    ("acceptance", "strict"),
    ("mix_ratio", 0.3),
    ("commit_rule", "leftmost"),
    ("first_token", None),
]


def defaults_of(function: Any) -> list[tuple[str, Any]]:
    """Name and default of each parameter, in order; all may be given by position or name."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append((parameter.name, parameter.default))
    return found


def test_exported_names() -> None:
    assert twotower.__all__ == [
        "AsyncGenerationStream",
        "Block",
        "GenerationParams",
        "GenerationResult",
        "GenerationStream",
        "ProvisionalBlock",
        "Request",
        "TextBlock",
        "TwoTower",
        "Usage",
        "__version__",
    ]
    for name in twotower.__all__:
        assert getattr(twotower, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Towers'"):
        _ = twotower.Towers


def test_the_signatures() -> None:
    empty = inspect.Parameter.empty
    assert defaults_of(TwoTower.generate) == [
        ("self", empty),
        ("prompts", empty),
        ("mode", "mask_diffusion"),
        ("max_tokens", 64),
        ("block_size", 16),
        ("steps_per_block", 16),
        ("confidence_threshold", 0.8),
        ("temperature", 0.0),
        ("top_k", None),
        ("top_p", None),
        ("min_p", None),
        ("seed", None),
        ("eos_token_id", None),
        ("draft_steps", 1),
        ("min_tokens", 0),
        ("stop", None),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0.0),
        ("logit_bias", None),
        ("top_logprobs", 0),
        *OF_DRAFTS,
    ]
    of_generate = defaults_of(TwoTower.generate)[2:]
    for stream in (TwoTower.stream, TwoTower.astream):
        head, *middle, last = defaults_of(stream)[1:]
        assert (head, last) == (("prompt", empty), ("generated_token_ids", ()))
        drafts = len(OF_DRAFTS)
        assert middle == [*of_generate[:-drafts], ("provisional", False), *OF_DRAFTS]
    assert defaults_of(TwoTower.from_pretrained) == [
        ("path", None),
        ("device", "cpu"),
        ("dtype", "float32"),
        ("progress", None),
        ("expert_products", "widened"),
        ("self_test", None),
        ("deterministic", False),
    ]
    assert defaults_of(TwoTower.score) == [("self", empty), ("token_ids", empty)]
    assert defaults_of(TwoTower.logits) == [("self", empty), ("prompts", empty)]
    assert defaults_of(TwoTower.decode) == [("self", empty), ("token_ids", empty)]


@pytest.mark.parametrize("wanted", [False, True])
def test_the_mode_of_the_towers(folder: Path, wanted: bool) -> None:
    loaded = TwoTower.from_pretrained(folder, deterministic=wanted)
    towers = loaded._context.tower, loaded._denoiser.tower
    assert {tower.deterministic for tower in towers} == {wanted}


def test_the_defaults_of_a_request_are_those_of_generate() -> None:
    params = GenerationParams()
    for name, default in defaults_of(TwoTower.generate)[2:]:
        assert getattr(params, name) == (() if name in ("stop", "logit_bias") else default)


def test_what_a_result_holds() -> None:
    assert set(GenerationResult.__dataclass_fields__) == {
        "token_ids",
        "text",
        "finish_reason",
        "nfe",
        "context_passes",
        "seed",
        "blocks",
        "matched_stop",
        "cached_tokens",
        "accepted_tokens",
        "drafted_tokens",
        "lookup_accepted_tokens",
        "lookup_drafted_tokens",
        "log_probs",
        "top_log_probs",
    }
    fields = set(twotower.Block.__dataclass_fields__)
    assert {"token_ids", "commit_steps", "confidences"} <= fields


@pytest.mark.parametrize("mode", MODES)
def test_results_are_consistent(model: TwoTower, mode: Any) -> None:
    results = model.generate([PROMPT, [1]], mode=mode, max_tokens=37, seed=4)
    assert len(results) == 2
    for result in results:
        assert len(result.token_ids) == 37
        assert result.finish_reason == "length"
        assert result.seed == 4
        assert result.text == ""
        assert [token for block in result.blocks for token in block.token_ids] == result.token_ids
        for block in result.blocks:
            assert len(block.commit_steps) == len(block.confidences) == len(block.token_ids)
            assert all(0.0 < confidence <= 1.0 for confidence in block.confidences)
        shares = [value for block in result.blocks for value in block.confidences]
        assert [math.exp(value) for value in result.log_probs] == pytest.approx(shares, rel=1e-5)
        assert sum(block.nfe for block in result.blocks) == result.nfe
    if mode == "mask_diffusion":
        assert [len(block.token_ids) for block in results[0].blocks] == [16, 16, 5]
        assert 3 <= results[0].nfe <= 48
        assert results[0].context_passes == 3
    elif mode not in ("verified", "auto"):
        assert [len(result.blocks) for result in results] == [1, 1]
        assert results[0].blocks[0].commit_steps == tuple(range(37))
        assert results[0].nfe == (0 if mode == "ar" else 37)


@pytest.mark.parametrize("mode", MODES)
def test_alternatives_of_a_result(model: TwoTower, mode: Any) -> None:
    how = {"mode": mode, "max_tokens": 10, "seed": 4}
    plain = model.generate([PROMPT], **how)[0]
    result = model.generate([PROMPT], top_logprobs=3, **how)[0]
    assert plain.top_log_probs == []
    assert result.token_ids == plain.token_ids
    # Which tokens share a pass here depends on how long passes take, and with it last bits.
    rounds = mode in ("verified", "auto")
    expected = pytest.approx(plain.log_probs, abs=1e-5) if rounds else plain.log_probs
    assert result.log_probs == expected
    assert [len(line) for line in result.top_log_probs] == [3] * 10
    assert result.top_log_probs == [line for b in result.blocks for line in b.top_log_probs]
    # The best of the model's own distribution, which is drawn where nothing else was asked for.
    assert [line[0][0] for line in result.top_log_probs] == result.token_ids


def test_a_bias_forces_and_forbids(model: TwoTower) -> None:
    forced = model.generate([PROMPT], max_tokens=6, logit_bias={9: 100.0}, seed=4)[0]
    assert forced.token_ids == [9] * 6
    free = model.generate([PROMPT], mode="ar", max_tokens=3)[0]
    banned = dict.fromkeys(free.token_ids, -100.0)
    others = model.generate([PROMPT], mode="ar", max_tokens=3, logit_bias=banned)[0]
    assert not {*others.token_ids} & {*free.token_ids}


def recorded(folder: Path, kind: str) -> list[tuple[dict[str, Any], list[int], list[int]]]:
    """Cases of one kind as (case, prompt, output after the prompt)."""
    tensors = load_file(folder / "golden.safetensors")
    cases = []
    for case in json.loads((folder / "manifest.json").read_text())["cases"]:
        if case["kind"] == kind and case.get("batch", 1) == 1:
            prompt = tensors[f"{case['id']}/prompt"][0].tolist()
            output = tensors[f"{case['id']}/output"][0].tolist()
            cases.append((case, prompt, output[len(prompt) :]))
    return cases


@pytest.mark.parametrize("mode", MODES)
def test_recorded_outputs_are_cut_at_the_first_eos(
    model: TwoTower, folder: Path, mode: Any
) -> None:
    """The whole public way, at a number of tokens that does not divide by the block."""
    for case, prompt, output in recorded(folder, mode):
        eos = case["info"].get("eos_token_id")
        want = output[: output.index(eos) + 1] if eos in output else output[:-3]
        result = model.generate(
            [prompt],
            mode=mode,
            max_tokens=len(output) - 3 if eos is None else case["max_new_tokens"],
            block_size=case.get("block", 16),
            steps_per_block=case.get("steps", 16),
            confidence_threshold=case.get("gamma", 0.8),
            commit_rule="released",
            eos_token_id=eos,
        )[0]
        assert result.token_ids == want, case["id"]
        assert result.finish_reason == ("length" if eos is None else "stop")


class Letters:
    """A tokenizer of one letter per id, far from the letters that a prompt could have."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x4E00 for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(0x4E00 + token) for token in token_ids)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("length", [1, 3])
def test_a_stop_string_ends_a_row(engines: Engines, mode: Any, length: int) -> None:
    writing = TwoTower(*engines, Letters())
    how = {"mode": mode, "max_tokens": 40, "block_size": 4, "temperature": 1.0, "seed": 3}
    free = writing.generate([PROMPT], **how)[0]
    assert free.text == Letters().decode(free.token_ids)
    assert free.matched_stop is None
    # Its first occurrence is where it ends, and it lies over the border of two blocks.
    stop = free.text[9 - length : 9]
    end = free.text.index(stop) + length
    result = writing.generate([PROMPT], stop=["zz", stop], **how)[0]
    assert (result.finish_reason, result.matched_stop) == ("stop", stop)
    assert result.token_ids == free.token_ids[:end]
    assert result.text == free.text[: end - length]
    assert result.log_probs == pytest.approx(free.log_probs[:end], abs=1e-4)
    assert [token for block in result.blocks for token in block.token_ids] == result.token_ids
    assert [engine.num_rows for engine in engines] == [0, 0]


def test_eos_waits_for_min_tokens(model: TwoTower) -> None:
    """In a greedy row, EOS made of the token that would come soonest."""
    free = model.generate([PROMPT], mode="ar", max_tokens=20)[0]
    eos = free.token_ids[0]
    assert model.generate([PROMPT], mode="ar", eos_token_id=eos)[0].token_ids == [eos]
    for mode in MODES:
        result = model.generate(
            [PROMPT], mode=mode, max_tokens=20, eos_token_id=eos, min_tokens=12
        )[0]
        assert eos not in result.token_ids[:12]
        assert len(result.token_ids) > 12


def test_greedy_rows_do_not_depend_on_the_seed_and_sampled_ones_do(model: TwoTower) -> None:
    greedy = {tuple(model.generate([PROMPT], seed=seed)[0].token_ids) for seed in (1, 2, None)}
    assert len(greedy) == 1
    drawn = model.generate([PROMPT, PROMPT], temperature=1.0)
    assert drawn[0].seed != drawn[1].seed
    assert drawn[0].token_ids != drawn[1].token_ids
    again = model.generate([PROMPT], temperature=1.0, seed=drawn[1].seed)[0]
    assert again.token_ids == drawn[1].token_ids


def test_requests_mix_modes(model: TwoTower) -> None:
    requests = [Request(PROMPT, GenerationParams(mode=mode, max_tokens=9)) for mode in MODES]
    results = model.generate_requests(requests)
    for mode, result in zip(MODES, results, strict=True):
        alone = model.generate([PROMPT], mode=mode, max_tokens=9)[0]
        assert result.token_ids == alone.token_ids


def test_no_prompts_give_no_results(model: TwoTower) -> None:
    assert model.generate([]) == []


def test_scores(model: TwoTower) -> None:
    scores = model.score(PROMPT)
    assert len(scores) == len(PROMPT) - 1
    assert all(math.isfinite(score) and score < 0 for score in scores)
    assert model.score(PROMPT[:3]) == pytest.approx(scores[:2], abs=1e-4)
    assert model.score([7]) == []


def test_logits_are_those_that_scores_are_of(model: TwoTower) -> None:
    first, second = model.logits([PROMPT, [7]])
    assert first.shape == (len(PROMPT), model.config.vocab_size)
    assert second.shape == (1, model.config.vocab_size)
    table = torch.log_softmax(first.float(), dim=-1)
    scores = [float(table[at, token]) for at, token in enumerate(PROMPT[1:])]
    assert scores == pytest.approx(model.score(PROMPT), abs=1e-5)
    assert model.logits([[7]])[0].equal(second)
    for prompts in ([[]], [[10**6]], PROMPT, "text"):
        with pytest.raises(InvalidRequestError):
            model.logits(prompts)


async def test_it_works_inside_an_event_loop(model: TwoTower) -> None:
    """As in a notebook."""
    await asyncio.sleep(0)
    assert len(model.generate([PROMPT], max_tokens=5)[0].token_ids) == 5


@pytest.mark.parametrize(
    ("prompts", "changes", "field"),
    [
        ([[]], {}, "prompt"),
        ([PROMPT, [1, -1]], {}, r"prompt\[1\]"),
        ([[10**6]], {}, r"prompt\[0\]"),
        ([[True]], {}, r"prompt\[0\]"),
        ("text", {}, "prompts"),
        (["text"], {}, "prompt"),
        (PROMPT, {}, "prompt"),
        (None, {}, "prompts"),
        ({"input_ids": [PROMPT]}, {}, "prompts"),
        (torch.tensor(PROMPT), {}, "prompts"),
        ([torch.tensor([PROMPT, PROMPT])], {}, "prompt"),
        ([b"text"], {}, "prompt"),
        ([["text"]], {}, r"prompt\[0\]"),
        (torch.tensor([[1.0, 2.0]]), {}, r"prompt\[0\]"),
        (np.array([[True]]), {}, r"prompt\[0\]"),
        (["a\ud83d"], {}, r"prompt\[1\]"),
        ([PROMPT], {"max_tokens": np.bool_(True)}, "max_tokens"),
        ([PROMPT], {"eos_token_id": torch.tensor([1])}, "eos_token_id"),
        ([PROMPT], {"max_tokens": 0}, "max_tokens"),
        ([PROMPT], {"max_tokens": 10**6}, "max_tokens"),
        ([PROMPT], {"block_size": 0}, "block_size"),
        ([PROMPT], {"steps_per_block": 0}, "steps_per_block"),
        ([PROMPT], {"confidence_threshold": 1.5}, "confidence_threshold"),
        ([PROMPT], {"temperature": math.nan}, "temperature"),
        ([PROMPT], {"temperature": -1.0}, "temperature"),
        ([PROMPT], {"mode": "dream"}, "mode"),
        ([PROMPT], {"eos_token_id": 10**6}, "eos_token_id"),
        ([PROMPT], {"draft_steps": 0}, "draft_steps"),
        ([PROMPT], {"min_tokens": 65}, "min_tokens"),
        ([PROMPT], {"stop": "x"}, "stop"),
        ([PROMPT], {"stop": ["x"]}, "stop"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    model: TwoTower, engines: Engines, prompts: Any, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{field}: got .*expected"):
        model.generate(prompts, **changes)
    assert [engine.num_rows for engine in engines] == [0, 0]


def test_ids_are_lists_arrays_or_tensors(model: TwoTower) -> None:
    """As scripts for the released code have them, the end-of-text id and limits too."""
    want = model.generate([PROMPT], max_tokens=5, eos_token_id=7, seed=3)[0]
    scores = model.score(PROMPT)
    several: list[Any] = [torch.tensor([PROMPT]), np.array([PROMPT]), [torch.tensor([PROMPT])]]
    several += [[torch.tensor(PROMPT)], [np.array(PROMPT)], [list(torch.tensor(PROMPT))]]
    numbers = {"max_tokens": np.int64(5), "eos_token_id": torch.tensor(7), "seed": np.uint8(3)}
    for prompts in several:
        result = model.generate(prompts, **numbers)[0]
        assert (result.token_ids, result.seed) == (want.token_ids, 3)
    for ids in (torch.tensor([PROMPT]), np.array(PROMPT), list(np.array(PROMPT))):
        assert model.score(ids) == scores
        assert model.encode(ids) == PROMPT
    both = model.generate(torch.tensor([PROMPT, PROMPT[::-1]]), max_tokens=5)
    assert [one.token_ids for one in both] == [
        model.generate([ids], max_tokens=5)[0].token_ids for ids in (PROMPT, PROMPT[::-1])
    ]


def test_decoding(model: TwoTower, engines: Engines) -> None:
    writing = TwoTower(*engines, Letters())
    for ids in (PROMPT, torch.tensor([PROMPT]), np.array(PROMPT)):
        assert writing.decode(ids) == Letters().decode(PROMPT)
    last = model.config.vocab_size
    for wrong in ([-1], [last], np.array([1.0]), [True], [2**70]):
        with pytest.raises(InvalidRequestError, match=rf"^token_ids\[0\]: got .*0\.\.{last - 1}$"):
            writing.decode(wrong)
    with pytest.raises(InvalidRequestError, match="this model has no tokenizer"):
        model.decode(PROMPT)


def test_a_vocabulary_of_another_size_than_the_models(
    model: TwoTower, engines: Engines, tmp_path: Path
) -> None:
    """Larger: a text that needs what the model lacks is refused. Smaller: the rest has no text."""
    size = model.config.vocab_size
    tools = [AddedToken(f"<tool {index}>", special=False) for index in range(size)]
    larger = load_tokenizer(saved(llama, tmp_path / "larger", tools))
    smaller = load_tokenizer(saved(word_level, tmp_path / "smaller"))
    assert larger is not None
    assert smaller is not None
    text = f"<tool {size - 1}>"
    assert larger.encode(text)[-1] > size
    reading = TwoTower(*engines, larger)
    with pytest.raises(InvalidRequestError, match=rf"^prompt\[\d\]: got .*0\.\.{size - 1}$"):
        reading.generate([text])
    # An empty text is the special token that begins one.
    empty, begun = reading.generate(["", [1]], max_tokens=4)
    assert empty.token_ids == begun.token_ids
    writing = TwoTower(*engines, smaller)
    result = writing.generate([PROMPT], max_tokens=40, temperature=1.0, seed=1)[0]
    assert result.text == smaller.decode(result.token_ids)
    assert max(result.token_ids) > 20
    with pytest.raises(InvalidRequestError, match=r"^prompt: got \[\], expected at least 1 token"):
        writing.generate([""])


def test_bad_scores_are_refused(model: TwoTower) -> None:
    for ids in ([], [-1, 2], [1, 10**6], [1.0], [True], torch.tensor([[1], [2]]), 5, "text"):
        with pytest.raises(InvalidRequestError):
            model.score(ids)


def test_a_bad_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder, nor a hub id"):
        TwoTower.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError):
        TwoTower.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "int8", torch.bfloat16, ["float32"], None])
def test_a_dtype_that_is_not_computed_is_refused_before_the_model_is_read(dtype: Any) -> None:
    with pytest.raises(InvalidRequestError) as refused:
        TwoTower.from_pretrained("no-such-folder", dtype=dtype)
    assert str(refused.value) == f"dtype: got {dtype!r}, expected one of float32, bfloat16"


def test_experts_are_multiplied_as_they_are_stored(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="expert_products: got 'int8', expected one of"):
        TwoTower.from_pretrained("no-such-folder", expert_products="int8")
    with pytest.raises(ConfigError, match="expert_products: got 'fp8', expected 'widened': the"):
        TwoTower.from_pretrained(folder, expert_products="fp8")
    quantize_checkpoint(folder, tmp_path / "8_bits")
    models = [
        TwoTower.from_pretrained(tmp_path / "8_bits", expert_products=products)
        for products in ("widened", "fp8")
    ]
    scores = [model.score([5, 9, 11, 7, 30]) for model in models]
    assert scores[1] == pytest.approx(scores[0], abs=0.5)
    assert scores[1] != scores[0]


def test_a_checkpoint_in_fp16_is_converted(folder: Path, tmp_path: Path) -> None:
    """Whatever its config says: the dtype that is computed in is the caller's."""
    raw = json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float16"}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    for path in folder.glob("model*.safetensors"):
        halves = {name: value.half() for name, value in load_file(path).items()}
        save_file(halves, tmp_path / path.name)
    for path in folder.glob("*.index.json"):
        (tmp_path / path.name).write_text(path.read_text())
    for dtype in ("float32", "bfloat16"):
        model = TwoTower.from_pretrained(tmp_path, dtype=dtype)
        assert len(model.generate([PROMPT], max_tokens=9)[0].token_ids) == 9


def test_bf16_runs(folder: Path) -> None:
    model = TwoTower.from_pretrained(str(folder), device=("cpu", "cpu"), dtype="bfloat16")
    for mode in MODES:
        assert len(model.generate([PROMPT, [1]], mode=mode, max_tokens=9)[0].token_ids) == 9


@pytest.mark.parametrize("device", ["foo", "meta", "cuda:7", ("cpu", "cuda:7"), ("cpu:3", "cpu")])
def test_a_device_that_is_not_here(device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    named = device if isinstance(device, str) else next(one for one in device if one != "cpu")
    with pytest.raises(ConfigError, match=f"^device: got '{named}', expected c"):
        TwoTower.from_pretrained(None, device)
