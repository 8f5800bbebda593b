"""`verify_folder` holds for the recorded cases, and misses every number that differs."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.towers.errors import CheckpointError
from twotower.towers.verify import verify_folder

PREDICTIONS = ("trace.predicted", "trace.confidence")


def test_every_recorded_case_holds(folder: Path) -> None:
    lines: list[str] = []
    told: list[tuple[int, int, str]] = []
    assert verify_folder(folder, report=lines.append, progress=lambda *one: told.append(one))
    cases = json.loads((folder / "manifest.json").read_text())["cases"]
    assert len(lines) == len(cases) + 1
    assert told == [(index, len(cases), case["id"]) for index, case in enumerate(cases)]
    for case, line in zip(cases, lines, strict=False):
        assert line.split()[:3] == ["ok", case["kind"], case["id"]]
    assert lines[-1].startswith(f"{len(cases)} of {len(cases)} cases hold ({folder.name}, cpu")


@cache
def recorded(source: Path) -> tuple[list[Any], dict[str, Tensor]]:
    manifest = json.loads((source / "manifest.json").read_text())
    return manifest["cases"], load_file(source / "golden.safetensors")


def copy_of(source: Path, target: Path, case_id: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A folder with links to a checkpoint and one of its cases; returns case and tensors."""
    for path in source.iterdir():
        if path.name not in ("manifest.json", "golden.safetensors"):
            (target / path.name).symlink_to(path)
    cases, everything = recorded(source)
    case = copy.deepcopy(next(case for case in cases if case["id"] == case_id))
    tensors = {key: value for key, value in everything.items() if key.split("/")[0] == case_id}
    write(target, [case], tensors)
    return case, tensors


def write(target: Path, cases: list[Any], tensors: dict[str, Tensor]) -> None:
    (target / "manifest.json").write_text(json.dumps({"cases": cases}))
    save_file(tensors, target / "golden.safetensors")


def misses(folder: Path) -> list[str]:
    lines: list[str] = []
    held = verify_folder(folder, report=lines.append)
    found = [line for line in lines if line.startswith("MISS")]
    assert held == (not found)
    return found


@pytest.mark.parametrize(
    ("case_id", "name", "amount"),
    [
        ("prefill_7", "logits_last", 0.01),
        ("prefill_7", "ssm.0", 0.01),
        ("prefill_7", "conv.0", 0.01),
        ("prefill_7", "s2_ssm.0", 0.01),
        ("prefill_7", "k.2", 0.01),
        ("extend_5_1", "logits_after", 0.01),
        ("extend_5_1", "v.2", 0.01),
        ("denoise_part", "logits", 0.01),
        ("denoise_part", "hidden_in.4", 0.01),
        ("denoise_part", "mixer_in.0", 0.01),
        ("denoise_part", "hidden_out", 0.01),
        ("denoise_part", "hidden_out_normed", 0.01),
        ("denoise_part", "t_repr", 0.01),
        ("denoise_part", "t_emb", 0.01),
        ("denoise_part", "t_sinusoid", 0.01),
        ("denoise_part", "gate.8", 0.01),
        ("md_g04", "output", 1),
        ("md_g04", "trace.xt_after", 1),
        ("md_g04", "trace.predicted", 1),
        ("md_g04", "trace.confidence", 0.01),
        ("md_g04", "trace.t", 0.01),
        ("md_b2", "alone.1.output", 1),
        ("ar_24", "output", 1),
        ("ar_24", "logits", 0.01),
        ("mock_24", "output", 1),
        ("mock_24", "logits", 0.01),
        ("score_30", "token_logprobs", 0.01),
        ("score_30", "sum_logprob", 0.5),
    ],
)
def test_a_recorded_number_that_differs_is_missed(
    tiny_b: Path, tmp_path: Path, case_id: str, name: str, amount: float
) -> None:
    case, tensors = copy_of(tiny_b, tmp_path, case_id)
    value = tensors[f"{case_id}/{name}"].clone()
    # The last element: everything up to the end has to be compared. Of predictions only those at
    # masked positions mean something; at the first call all are.
    value.view(-1)[0 if name in PREDICTIONS else -1] += amount
    write(tmp_path, [case], tensors | {f"{case_id}/{name}": value})
    found = misses(tmp_path)
    assert len(found) == 1
    assert case_id in found[0]


def test_the_count_of_calls_is_compared(tiny_b: Path, tmp_path: Path) -> None:
    case, tensors = copy_of(tiny_b, tmp_path, "md_g04")
    assert misses(tmp_path) == []
    case["info"]["nfe"] += 1
    write(tmp_path, [case], tensors)
    assert "nfe[0]" in misses(tmp_path)[0]


def test_an_unknown_kind_is_missed(tiny_b: Path, tmp_path: Path) -> None:
    case, tensors = copy_of(tiny_b, tmp_path, "prefill_7")
    write(tmp_path, [case | {"kind": "dream"}], tensors)
    assert "kind 'dream' is unknown" in misses(tmp_path)[0]


@pytest.mark.parametrize("manifest", [None, "{", "{}", '{"cases": []}', "[]"])
def test_a_folder_without_cases_is_an_error(
    tiny_b: Path, tmp_path: Path, manifest: str | None
) -> None:
    copy_of(tiny_b, tmp_path, "prefill_7")
    (tmp_path / "manifest.json").unlink()
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_folder(tmp_path, report=lambda _: None)


def test_unreadable_tensors_are_an_error(tiny_b: Path, tmp_path: Path) -> None:
    copy_of(tiny_b, tmp_path, "prefill_7")
    (tmp_path / "golden.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(CheckpointError, match=r"golden\.safetensors"):
        verify_folder(tmp_path, report=lambda _: None)
