"""Files of prompts: JSONL, lines, pieces between empty lines; and what is wrong in one."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.sweep.prompts import SweepPrompt, digest, read_prompts
from twotower.towers.errors import InvalidRequestError


def written(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_bytes(text.encode("utf-8"))
    return path


def test_jsonl_with_and_without_a_reference(tmp_path: Path) -> None:
    lines = '{"prompt": "a\\nb", "reference": "c"}\n\n{"prompt": "d", "other": 1}\n'
    path = written(tmp_path, "p.jsonl", lines)
    assert read_prompts(path) == [SweepPrompt("a\nb", "c"), SweepPrompt("d")]
    assert read_prompts(path, 1) == [SweepPrompt("a\nb", "c")]


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("one\ntwo\n", ["one", "two"]),
        ("\n\none\ntwo\n\n", ["one", "two"]),
        ("def f():\n    pass\n\n \n\nclass A:\n", ["def f():\n    pass", "class A:"]),
    ],
)
def test_text_by_lines_or_by_empty_lines(tmp_path: Path, text: str, prompts: list[str]) -> None:
    found = read_prompts(written(tmp_path, "p.txt", text))
    assert [prompt.text for prompt in found] == prompts


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.txt", " \n\n", "prompts: got 'p.txt', expected a file of at least 1 prompt"),
        ("p.jsonl", "", "prompts: got 'p.jsonl', expected a file of at least 1 prompt"),
        ("p.jsonl", '{"prompt": "a"}\nno\n', "prompts line 2: got 'no', expected one JSON object"),
        ("p.jsonl", "[1]", r"prompts line 1: got \[1\], expected a JSON object"),
        ("p.jsonl", '{"text": "a"}', r"line 1, prompt: got None, expected a text \(\['text'\]"),
        ("p.jsonl", '{"prompt": ""}', "line 1, prompt: got '', expected a text"),
        ("p.jsonl", '{"prompt": "a", "reference": 3}', "line 1, reference: got 3"),
    ],
)
def test_what_is_no_prompt(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        read_prompts(written(tmp_path, name, text))


def test_other_bytes_than_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequestError, match="expected UTF-8"):
        read_prompts(path)


def test_other_prompts_have_another_name() -> None:
    one, two = SweepPrompt("a"), SweepPrompt("b")
    names = {
        digest(each) for each in ([one], [two], [one, two], [two, one], [SweepPrompt("a", "")])
    }
    assert len(names) == 5
    assert digest([SweepPrompt("a")]) == digest([one])
