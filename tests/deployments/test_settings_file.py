"""Settings files: what they hold, and by which key or line they are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from twotower.deployments.config import ServiceConfig
from twotower.deployments.settings_file import read_settings
from twotower.towers.errors import ConfigError


def test_what_a_file_holds(tmp_path: Path) -> None:
    path = tmp_path / "service.yaml"
    for text, held in (
        ("", {}),
        ("# nothing\n", {}),
        (
            "model: größe\nautoscaling: {max_pairs: 2}",
            {"model": "größe", "autoscaling": {"max_pairs": 2}},
        ),
    ):
        path.write_text(text, encoding="utf-8")
        assert read_settings(path) == held


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1: 2", "1: got a key of type int"),
        ("num_pairs: 2\n1: 2\nfoo: 3", "1: got a key of type int"),
        ("null: 2", "None: got a key of type NoneType"),
        ("on: 2", "True: got a key of type bool"),
        ("2.5: a", "2.5: got a key of type float"),
        ("2026-01-01: a", "2026-01-01: got a key of type date"),
        ("autoscaling: {1: 2}", "autoscaling.1: got a key of type int"),
        ("label_selector: {1: a}", "label_selector.1: got a key of type int"),
        ("'1': 2", "1: Extra inputs are not permitted"),
        ('"a\\nb": 2', "'a\\nb': Extra inputs are not permitted"),
        ("x: 1\n? [a, b]\n: c", "service.yaml: unreadable (ConstructorError in line 2"),
        ("model: x\ndtype: [", "service.yaml: unreadable (ParserError in line 2"),
        ("model: 2026-99-99", "service.yaml: unreadable (ValueError)"),
        ("[" * 5000, "service.yaml: unreadable (RecursionError)"),
    ],
)
def test_keys_and_lines_are_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        ServiceConfig.from_file(path)
    assert str(refused.value).startswith(named)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("text", ["- a\n", "a: [", "\x00"])
def test_unreadable_files(tmp_path: Path, text: str) -> None:
    path = tmp_path / "service.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"service\.yaml"):
        ServiceConfig.from_file(path)
    with pytest.raises(ConfigError, match="absent"):
        ServiceConfig.from_file(tmp_path / "absent.yaml")
