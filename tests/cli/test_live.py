"""A completion on a terminal, item by item, as an emulator shows it."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from rich.console import Console
from rich.text import Text

from tests.support.terminal import Screen
from twotower.cli.live import (
    BlockDisplay,
    Decode,
    folded,
    glyphs_of,
    pieces_of,
    shade,
    visible,
)
from twotower.towers.request.results import TextBlock

GLYPHS = ("░", "▞")


@dataclass(frozen=True)
class Draft:
    """A provisional block."""

    step: int
    token_ids: tuple[int, ...]
    masked: tuple[bool, ...]
    confidences: tuple[float, ...]
    start: int = 0


def block(text: str, tokens: int = 4, steps: int = 2) -> TextBlock:
    """A committed block of so many tokens, from so many passes."""
    ids, where = tuple(range(tokens)), tuple(index % steps for index in range(tokens))
    return TextBlock(0, 0, ids, text, where, (1.0,) * tokens, (0.0,) * tokens)


class Terminal:
    """A console whose bytes an emulator shows, with a clock that stands at `now`."""

    def __init__(self, columns: int = 40, rows: int = 10) -> None:
        self._file = io.StringIO()
        self._fed = 0
        self.now = 0.0
        self.console = Console(
            file=self._file,
            force_terminal=True,
            color_system="256",
            width=columns,
            height=rows,
            highlight=False,
            _environ={"TERM": "xterm-256color"},
        )
        self.screen = Screen(columns, rows)

    def display(self, size: int = 4, most: int = 100, decode: Decode | None = None) -> BlockDisplay:
        display = BlockDisplay(
            self.console, "mask_diffusion", size, most, decode, clock=lambda: self.now
        )
        # What the thread draws, drawn when a test looks.
        display._live.auto_refresh = False
        return display

    def resize(self, columns: int, rows: int) -> None:
        self.look()
        self.console.size = (columns, rows)  # type: ignore[assignment]
        self.screen.shown.resize(rows, columns)

    def look(self, display: BlockDisplay | None = None) -> list[str]:
        """The screen's rows now."""
        if display is not None:
            display._live.refresh()
        written = self._file.getvalue()
        new, self._fed = written[self._fed :], len(written)
        # As the terminal's driver does.
        self.screen.feed(new.replace("\n", "\r\n").encode())
        return self.screen.lines()


def letters(ids: Sequence[int]) -> str:
    """A tokenizer whose tokens are letters: 1 is a."""
    return "".join(chr(96 + one) for one in ids)


def test_a_block_fills_in_place_and_only_the_text_stays() -> None:
    terminal = Terminal(columns=60)
    with terminal.display(decode=letters) as display:
        assert terminal.look() == ["░░░░", "0 tokens, 0.0 tokens/s, mask_diffusion"]
        display.take(Draft(0, (1, 0, 0, 4), (True, True, True, False), (0.5, 0.0, 0.0, 0.9)))
        terminal.now = 2.0
        figures = "0 tokens, 0.0 tokens/s, mask_diffusion, step 1"
        assert terminal.look(display) == ["a░░d", figures]
        display.take(block("abcd\nef", tokens=6, steps=3))
        assert terminal.look(display)[:2] == ["abcd", "ef░░░░"]
        assert terminal.look()[2].startswith("6 tokens, 2.00 tokens/pass, 3.0 tokens/s")
    assert terminal.look() == ["abcd", "ef"]
    assert terminal.screen.all_lines() == ["abcd", "ef"]
    assert not terminal.screen.cursor_is_hidden
    # The next output goes on where the text ends, as in a pipe.
    assert (terminal.screen.shown.cursor.x, terminal.screen.shown.cursor.y) == (2, 1)


def test_the_step_is_shown_until_the_block_is_committed() -> None:
    terminal = Terminal(columns=80)
    with terminal.display() as display:
        display.take(Draft(6, (1,), (True,), (0.5,)))
        assert terminal.look(display)[-1].endswith("mask_diffusion, step 7")
        display.take(block("x"))
        assert terminal.look(display)[-1].endswith("mask_diffusion")


def test_no_more_masks_than_tokens_may_come() -> None:
    terminal = Terminal()
    with terminal.display(size=16, most=10) as display:
        assert terminal.look()[0] == "░" * 10
        display.take(block("text", tokens=8))
        assert terminal.look(display)[0] == "text░░"
        display.take(block("!", tokens=2))
        assert terminal.look(display)[0] == "text!"


def test_confidence_goes_from_dim_to_bright() -> None:
    assert [shade(one) for one in (0.0, 0.29, 0.3, 0.59, 0.6, 0.84, 0.85, 1.0)] == [
        *["dim"] * 2,
        *["dim cyan"] * 2,
        *["cyan"] * 2,
        *["bold cyan"] * 2,
    ]
    terminal = Terminal()
    with terminal.display(decode=letters) as display:
        display.take(block("z"))
        display.take(Draft(0, (1, 2), (True, False), (0.7, 0.9)))
        terminal.look(display)
        committed, likely, sure = (terminal.screen.shown.buffer[0][x] for x in range(3))
        assert [one.data for one in (committed, likely, sure)] == ["z", "a", "b"]
        assert [one.bold for one in (committed, likely, sure)] == [False, False, True]
        assert [one.fg for one in (committed, likely, sure)] == ["default", "cyan", "cyan"]


def test_without_a_tokenizer_positions_are_shaded_glyphs() -> None:
    draft = Draft(0, (5, 6, 7), (False, True, True), (0.9, 0.4, 0.0))
    assert pieces_of(draft, (), None, GLYPHS) == [
        ("▞", "bold cyan"),
        ("▞", "dim cyan"),
        ("░", "dim"),
    ]


def test_text_of_tokens_that_share_a_character() -> None:
    """é in two tokens of a byte each, and a space that only a token before shows."""
    table = {1: b"caf", 2: b"\xc3", 3: b"\xa9", 4: b" au", 9: b""}

    def decode(ids: Sequence[int]) -> str:
        return b"".join(table[one] for one in ids).decode(errors="replace").lstrip(" ")

    sure = (False,) * 4, (1.0,) * 4
    texts = [text for text, _ in pieces_of(Draft(0, (2, 3, 4, 9), *sure), (1,), decode, GLYPHS)]
    # The first byte has no text of its own, nor has the special token.
    assert texts == ["▞", "é", " au", "▞"]
    alone = [text for text, _ in pieces_of(Draft(0, (4, 1, 2, 2), *sure), (1,), decode, GLYPHS)]
    assert alone[:2] == [" au", "caf"]


def test_the_first_token_of_a_block_keeps_its_space() -> None:
    table = {1: "un", 2: " mot"}

    def decode(ids: Sequence[int]) -> str:
        return "".join(table[one] for one in ids).lstrip(" ")

    terminal = Terminal()
    with terminal.display(size=1, decode=decode) as display:
        display.take(TextBlock(0, 0, (1,), "un", (0,), (1.0,), (0.0,)))
        display.take(Draft(0, (2,), (True,), (0.9,)))
        assert terminal.look(display)[0] == "un mot"


def test_a_masked_position_ends_a_run_of_text() -> None:
    draft = Draft(0, (1, 30, 2), (False, True, False), (1.0, 0.0, 1.0))
    assert [text for text, _ in pieces_of(draft, (), letters, GLYPHS)] == ["a", "░", "b"]


@pytest.mark.parametrize(
    ("encoding", "glyphs"),
    [("utf-8", ("░", "▞")), ("ascii", ("_", "#")), ("latin-1", ("_", "#")), ("none", ("_", "#"))],
)
def test_glyphs_that_the_terminal_lacks(encoding: str, glyphs: tuple[str, str]) -> None:
    assert glyphs_of(encoding) == glyphs


def test_long_outputs_scroll_away_once() -> None:
    """Ten screens of lines, a few at a time, some longer than a row."""
    terminal = Terminal(columns=20, rows=6)
    lines = [f"line {index}" + " more" * (index % 3) * 2 for index in range(60)]
    gone = 0
    with terminal.display(size=8) as display:
        text = "\n".join(lines)
        for start in range(0, len(text), 17):
            terminal.now += 0.06
            display.take(block(text[start : start + 17], tokens=1))
            assert len(terminal.look(display)) <= 6
            gone = max(gone, len(terminal.screen.shown.history.top))
    assert gone > 60
    terminal.look()
    want = [line[at : at + 20].rstrip() for line in lines for at in range(0, len(line), 20)]
    assert terminal.screen.all_lines() == want


def test_a_line_longer_than_the_screen_is_shown_by_its_end() -> None:
    terminal = Terminal(columns=10, rows=5)
    text = "".join(chr(97 + index // 10) for index in range(100))
    with terminal.display(size=2) as display:
        display.take(block(text))
        assert terminal.look(display) == ["iiiiiiiiii", "jjjjjjjjjj", "░░", "4 toke"]
    terminal.look()
    assert terminal.screen.all_lines() == [chr(97 + row) * 10 for row in range(10)]


def test_wide_and_combining_characters_keep_their_cells() -> None:
    terminal = Terminal(columns=9, rows=8)
    text = "日本語日本語ab"
    with terminal.display(size=3) as display:
        display.take(block(text))
        # A character of two cells does not fit into the ninth.
        rows = [row.replace(" ", "") for row in terminal.look(display)]
        assert rows[:3] == ["日本語日", "本語ab░░░", "4tok"]
        display.take(block("e"))
        display.take(block("\u0301!\nx"))
        assert terminal.look(display)[2] == "x░░░"
    assert terminal.look()[-1] == "x"
    assert "".join(terminal.screen.all_lines()).count("日") == 2


def test_rows_break_where_a_terminal_breaks_them() -> None:
    def rows(text: str, width: int) -> list[str]:
        return [row.plain for row in folded(Text(text), width)]

    assert rows("", 5) == [""]
    assert rows("ab cdef\n\ng", 5) == ["ab cd", "ef", "", "g"]
    assert rows("\tx", 10) == ["        x"]
    assert rows("日本", 3) == ["日", "本"]
    # A mark stays with the letter before it.
    assert rows("abe\u0301f", 3) == ["abe\u0301", "f"]


@pytest.mark.parametrize(("columns", "rows"), [(20, 10), (60, 10), (30, 6)])
def test_a_new_width_leaves_nothing_behind(columns: int, rows: int) -> None:
    terminal = Terminal(columns=40, rows=10)
    lines = [f"{index} {'word ' * 7}".rstrip() for index in range(5)]
    with terminal.display() as display:
        # Long enough after the start for lines to be printed for good.
        terminal.now = 1.0
        display.take(block("\n".join(lines)))
        terminal.look(display)
        terminal.resize(columns, rows)
        display.take(block(" end\nlast"))
        terminal.look(display)
    shown = "".join(terminal.look())
    assert shown.endswith("last")
    # The newest lines, each once; of the figures and the masks nothing.
    assert "".join(terminal.screen.all_lines()).count("3 word") == 1
    assert shown.count("4 word") == shown.count("end") == shown.count("last") == 1
    assert "tokens" not in shown
    assert "░" not in shown


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert visible("a\x1b[2J\x07\r\x9bb\u2028\tc\n") == "a\\x1b[2J\\x07\\r\\x9bb\\u2028\tc\n"
    assert visible("日本 e\u0301 👩\u200d💻") == "日本 e\u0301 👩\u200d💻"
    terminal = Terminal()
    with terminal.display(decode=lambda ids: "\x1b[2J" * len(ids)) as display:
        display.take(block("first\r\n\x1b[2Jsecond"))
        display.take(Draft(0, (1,), (False,), (1.0,)))
        assert terminal.look(display)[:2] == ["first", "\\x1b[2Jsecond\\x1b[2J"]
    assert terminal.look() == ["first", "\\x1b[2Jsecond"]


def test_an_interruption_leaves_the_text_and_a_new_line() -> None:
    terminal = Terminal()

    def interrupted() -> None:
        with terminal.display() as display:
            display.take(block("one\ntwo"))
            terminal.look(display)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert terminal.look() == ["one", "two"]
    assert not terminal.screen.cursor_is_hidden
    assert (terminal.screen.shown.cursor.x, terminal.screen.shown.cursor.y) == (0, 2)
