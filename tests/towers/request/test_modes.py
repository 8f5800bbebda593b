"""The table of modes: what follows from it for a row."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import MODES, TRAITS, Mode, served_modes
from twotower.towers.request.params import GenerationParams

ROOT = Path(__file__).parents[3]
FOLDERS = ("towers", "cluster", "deployments")


def test_every_mode_has_its_line() -> None:
    assert tuple(TRAITS) == MODES
    assert len(set(TRAITS.values())) == len(MODES)
    for mode in MODES:
        assert GenerationParams(mode=mode).traits is TRAITS[mode]


def test_a_context_tower_alone_serves_what_it_writes_itself() -> None:
    assert served_modes(with_denoiser=True) == MODES
    assert served_modes(with_denoiser=False) == ("ar", "verified", "auto")


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [("mask_diffusion", 3 + 24), ("ar", 3 + 20), ("mock_ar", 3 + 20), ("verified", 3 + 20 + 8)],
)
def test_context_that_a_row_may_need(mode: Mode, tokens: int) -> None:
    assert GenerationParams(mode=mode, max_tokens=20, block_size=8).context_tokens(3) == tokens


@pytest.mark.parametrize("mode", MODES)
def test_where_a_row_can_be_resumed(mode: Mode) -> None:
    params = GenerationParams(mode=mode, max_tokens=20, block_size=8)
    params.check_row([1], 9, 99, [1] * 8)
    if mode == "mask_diffusion":
        with pytest.raises(InvalidRequestError, match="whole blocks of 8"):
            params.check_row([1], 9, 99, [1] * 7)
    else:
        params.check_row([1], 9, 99, [1] * 7)


def test_nothing_compares_a_mode_with_its_name() -> None:
    """A ladder of comparisons has to be searched for when a mode is added; the table has not."""
    ladders = []
    for path in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Compare):
                continue
            constants = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            if {*MODES} & {value for value in constants if isinstance(value, str)}:
                ladders.append(f"{path.relative_to(ROOT)}:{node.lineno}: use params.traits")
    assert ladders == []
