"""Figures of the house: what counts, and that wrong pages and ways are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import house

SOURCE = '''"""A module."""
class Open(Protocol):
    def typed(self, x: int, *rest: str) -> int:
        """One line."""
        return x
class _Hidden:
    def bare(self, x):
        return x
'''
PAGE = f"# Map\n\n{house.BEGIN}\n{house.END}\n\nThe rest.\n"


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A house of three rooms, with a way of two hops."""
    files = {
        "kernels/scan.py": SOURCE,
        "kernels/scan_pb2.py": SOURCE,
        "towers/engine.py": "from twotower.kernels import scan\ndef run() -> None:\n    scan.x()\n",
        house.LAYERING: 'WINGS = {"kernels": "", "cluster": "", "towers": "kernels " "cluster"}',
        house.PAGE: PAGE,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (tmp_path / "twotower").mkdir()
    (tmp_path / "twotower" / "kernels").symlink_to(tmp_path / "kernels")
    monkeypatch.setattr(house, "WIRING", ())
    monkeypatch.setattr(
        house, "WAY", (("towers/engine.py", "run"), ("kernels/scan.py", "Open.typed"))
    )
    return tmp_path


def test_a_folder_s_figures(tree: Path) -> None:
    """Generated files and links do not count."""
    lines = house.table(tree).splitlines()
    assert "| `kernels` | 1 | 8 | 8 (8, 8) | 2.5 (3, 3) | 50% | 50% | 1 | 1 |" in lines
    assert "| `twotower` | 0 | 0 | - | - | - | - | 0 | 0 |" in lines


def test_figures_of_the_whole(tree: Path) -> None:
    text = house.table(tree)
    assert "| 3, 2 |" in text
    assert "public classes in them | 2, 1 |" in text


def test_a_written_page_passes_the_check(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.main(["--check"], tree) == 1
    assert "other figures than counted" in capsys.readouterr().err
    assert house.main(["--write"], tree) == 0
    assert house.main(["--check"], tree) == 0
    text = (tree / house.PAGE).read_text(encoding="utf-8")
    assert text.startswith("# Map\n\n")
    assert text.endswith("\n\nThe rest.\n")


def test_other_figures_are_shown(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    house.main(["--write"], tree)
    with (tree / "towers" / "engine.py").open("a", encoding="utf-8") as file:
        file.write("# A line more is no other house.\n")
    assert house.main(["--check"], tree) == 0
    with (tree / "towers" / "engine.py").open("a", encoding="utf-8") as file:
        file.write("class More: ...\n")
    assert house.main(["--check"], tree) == 1
    shown = capsys.readouterr().err
    assert "counted: | files from a gRPC request to a kernel, and public classes" in shown
    assert f"{house.PAGE}: | public classes in kernels" in shown


@pytest.mark.parametrize("marker", [house.BEGIN, house.END])
def test_a_page_without_markers(
    tree: Path, marker: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / house.PAGE).write_text(PAGE.replace(marker, ""), encoding="utf-8")
    assert house.main(["--check"], tree) == 1
    assert "add both" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("kernels/scan.py", "class Open: ...\n", "no Open.typed"),
        ("towers/engine.py", "def run() -> None: ...\n", "before Open.typed names it"),
        (house.LAYERING, 'WINGS = {"a": "b", "b": "a"}', "cycle"),
        (house.LAYERING, "", "no WINGS"),
    ],
)
def test_what_is_stale_is_named(tree: Path, file: str, text: str, said: str) -> None:
    (tree / file).write_text(text, encoding="utf-8")
    with pytest.raises(house.HouseError, match=said):
        house.table(tree)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("from twotower.kernels.scan import Open\n", True),
        ("from twotower.kernels import moe\n", False),
        ('CHOOSER = "twotower.kernels.scan.Open"\n', True),
        ("def f(a):\n    return a.typed.remote()\n", True),
        ("typed = 1\n", False),
    ],
)
def test_ways_to_name_a_hop(tree: Path, text: str, named: bool) -> None:
    (tree / "towers" / "engine.py").write_text(f"{text}def run(): ...\n", encoding="utf-8")
    if named:
        assert house.way(tree)[1][1] == "towers/engine.py"
    else:
        with pytest.raises(house.HouseError, match="names it"):
            house.way(tree)


def test_the_way_of_this_house_is_not_stale() -> None:
    files = [path for path, _ in house.WAY]
    assert len(set(files)) == len(files) == len(house.way(house.ROOT))
