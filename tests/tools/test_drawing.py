"""The pictures of the documentation: what they show, and that the committed ones are up to date."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from tests.test_layering import WINGS
from tools import drawing

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("name", list(drawing.PICTURES))
def test_the_committed_picture_is_the_one_that_is_drawn(name: str) -> None:
    committed = (drawing.FOLDER / name).read_text(encoding="utf-8")
    assert committed == drawing.PICTURES[name](), "run make drawings"


def test_every_wing_is_in_the_picture_once() -> None:
    found = texts(drawing.wings())
    for wing in WINGS:
        # Words that every wing may use stand together in one line.
        assert found.count(wing) == 1 or any(wing in text.split(", ") for text in found), wing


def test_a_wing_stands_above_all_that_it_uses() -> None:
    uses = {"a": set[str](), "b": {"a"}, "c": {"a", "b"}}
    assert drawing._floors(uses) == {"a": 0, "b": 1, "c": 2}
    # c's arrow to a follows from that to b.
    assert drawing._reduced(uses) == {"a": set(), "b": {"a"}, "c": {"b"}}


def test_a_picture_that_differs_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(drawing.PICTURES, "wings.svg", lambda: "<svg/>")
    assert drawing.main(["--check"]) == 1
    assert "docs/wings.svg" in capsys.readouterr().out
