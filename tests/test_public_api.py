"""The public Python API: names, signatures and what a result holds."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import twotower
from twotower import GenerationParams, GenerationResult, Request, TwoTower
from twotower.towers.errors import CheckpointError, ConfigError, InvalidRequestError

PROMPT = [5, 3, 17, 3, 9]
MODES: list[Any] = ["mask_diffusion", "ar", "mock_ar", "verified"]


def defaults_of(function: Any) -> list[tuple[str, Any]]:
    """Name and default of each parameter, in order; all may be given by position or name."""
    found = []
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        found.append((parameter.name, parameter.default))
    return found


def test_exported_names() -> None:
    assert twotower.__all__ == [
        "Block",
        "GenerationParams",
        "GenerationResult",
        "Request",
        "TwoTower",
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
    ]
    assert defaults_of(TwoTower.from_pretrained) == [
        ("path", None),
        ("device", "cpu"),
        ("dtype", "float32"),
    ]
    assert defaults_of(TwoTower.score) == [("self", empty), ("token_ids", empty)]


def test_the_defaults_of_a_request_are_those_of_generate() -> None:
    params = GenerationParams()
    for name, default in defaults_of(TwoTower.generate)[2:]:
        assert getattr(params, name) == (() if name == "stop" else default)


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
        "log_probs",
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
    elif mode != "verified":
        assert [len(result.blocks) for result in results] == [1, 1]
        assert results[0].blocks[0].commit_steps == tuple(range(37))
        assert results[0].nfe == (0 if mode == "ar" else 37)


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
def test_a_stop_string_ends_a_row(model: TwoTower, mode: Any, length: int) -> None:
    writing = TwoTower(model._context, model._denoiser, Letters())
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
    assert result.log_probs == free.log_probs[:end]
    assert [token for block in result.blocks for token in block.token_ids] == result.token_ids
    assert model._context.num_rows == model._denoiser.num_rows == 0


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
    model: TwoTower, prompts: Any, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^{field}: got .*expected"):
        model.generate(prompts, **changes)
    assert model._context.num_rows == model._denoiser.num_rows == 0


def test_bad_scores_are_refused(model: TwoTower) -> None:
    for ids in ([], [-1, 2], [1, 10**6]):
        with pytest.raises(InvalidRequestError):
            model.score(ids)


def test_a_bad_model_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder, nor a hub id"):
        TwoTower.from_pretrained(tmp_path / "absent")
    with pytest.raises(CheckpointError):
        TwoTower.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dtype: got 'int8'"):
        TwoTower.from_pretrained(folder, dtype="int8")


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
