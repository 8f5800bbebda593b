"""A completion on a terminal: the text, the block that is being filled, and a line of figures.

Finished lines are printed once, soon, and scroll away like any output. What is drawn anew is below
them: the lines since then, the block in flight and the figures, of which a screen shows the end.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, groupby
from types import TracebackType
from typing import Protocol
from unicodedata import category

from rich.cells import cell_len, chop_cells
from rich.console import Console, Group
from rich.live import Live
from rich.segment import Segment, Segments
from rich.text import Text

from twotower.towers.request.results import TextBlock

# Drawing takes milliseconds of a processor that a model in this process wants too.
REFRESHES_PER_S = 10
# Both are one cell wide in every terminal: Unicode gives others the width of the language.
MASKED, FILLED = "░", "▞"
MASKED_ASCII, FILLED_ASCII = "_", "#"
# Relative colours, which suit dark and light terminals alike, from these confidences on.
SHADES = ((0.85, "bold cyan"), (0.6, "cyan"), (0.3, "dim cyan"), (0.0, "dim"))
MASK_STYLE = "dim"
_TAB_CELLS = 8
# Tokens before the block that give its first token its space.
_CONTEXT_TOKENS = 8
# The terminal prints ^C where the cursor is, at the end of the figures, and must not begin a row.
_ECHO_CELLS = 4
# Lines that a screen may need again when its width changes.
_KEPT_LINES = 512

Decode = Callable[[Sequence[int]], str]
Pieces = list[tuple[str, str]]


class Provisional(Protocol):
    """A block after a denoising step: a position that is still `masked` has the present prediction,
    or confidence 0."""

    @property
    def step(self) -> int:
        """The denoising step, from 0."""

    @property
    def token_ids(self) -> Sequence[int]:
        """Ids of the block's positions."""

    @property
    def masked(self) -> Sequence[bool]:
        """Whether each position is still masked."""

    @property
    def confidences(self) -> Sequence[float]:
        """Probability of each id."""


class BlockDisplay:
    """Shows a stream's items on `console`, one by one by `take`, for as long as a `with` block
    lasts; then the text alone is left.

    `block_size` masks stand for a block of which nothing is known yet; 0 for modes without blocks.
    `decode` gives the text of ids; without it provisional tokens are shaded glyphs.
    """

    def __init__(
        self,
        console: Console,
        mode: str,
        block_size: int,
        max_tokens: int,
        decode: Decode | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._mode = mode
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._decode = decode
        self._clock = clock
        self._glyphs = glyphs_of(console.encoding)
        self._begun = self._printed = clock()
        self._tokens = self._passes = 0
        self._step: int | None = None
        self._before: tuple[int, ...] = ()
        self._tail = ""
        self._lines: deque[str] = deque(maxlen=_KEPT_LINES)
        self._pieces = self._unknown()
        self._width = console.width
        self._live = Live(
            console=console,
            get_renderable=self._region,
            transient=True,
            redirect_stdout=False,
            refresh_per_second=REFRESHES_PER_S,
        )

    def take(self, item: TextBlock | Provisional) -> None:
        """Shows a committed or a provisional block."""
        self._after_resize()
        if isinstance(item, TextBlock):
            self._commit(item)
        else:
            self._step = item.step + 1
            self._pieces = pieces_of(item, self._before, self._decode, self._glyphs)

    def _commit(self, block: TextBlock) -> None:
        self._tokens += len(block.token_ids)
        self._passes += max(block.commit_steps, default=-1) + 1
        self._before = (*self._before, *block.token_ids)[-_CONTEXT_TOKENS:]
        self._step, self._pieces = None, self._unknown()
        self._tail += block.text
        if "\n" in self._tail and self._clock() - self._printed >= 1 / REFRESHES_PER_S:
            self._finish_lines()

    def _finish_lines(self) -> None:
        """Prints what is complete of the tail, which is then not drawn any more."""
        self._printed = self._clock()
        *finished, self._tail = self._tail.split("\n")
        lines = [visible(line.removesuffix("\r")) for line in finished]
        self._lines.extend(lines)
        with self._console:
            self._live.refresh()
            self._print(lines)

    def _unknown(self) -> Pieces:
        """The block to come, of which no position is known."""
        count = min(self._block_size, self._max_tokens - self._tokens)
        return [(self._glyphs[0] * count, MASK_STYLE)]

    def _print(self, lines: Sequence[str]) -> None:
        """Prints lines above what is drawn anew, with breaks left to the terminal."""
        text = "".join(f"{line}\n" for line in lines)
        self._console.print(Segments([Segment(text)]), end="", soft_wrap=True)

    def _region(self) -> Group:
        """What is drawn anew, at most a screenful."""
        width, height = self._console.size
        # Of a tail that fills screens only the end is worth breaking into rows.
        whole_rows = max(0, len(self._tail) // width - 2 * height) * width
        text = Text(visible(self._tail[whole_rows:].replace("\r\n", "\n")))
        for piece, style in self._pieces:
            text.append(visible(piece), style)
        rows = folded(text, width)[-max(1, height - 2) :]
        return Group(*rows, self._figures())

    def _figures(self) -> Text:
        seconds = max(self._clock() - self._begun, 1e-9)
        parts = [f"{self._tokens} tokens"]
        if self._passes:
            parts.append(f"{self._tokens / self._passes:.2f} tokens/pass")
        parts += [f"{self._tokens / seconds:.1f} tokens/s", self._mode]
        if self._step is not None:
            parts.append(f"step {self._step}")
        figures = Text(", ".join(parts), style="dim", no_wrap=True)
        figures.truncate(max(1, self._console.width - _ECHO_CELLS), overflow="crop")
        return figures

    def _after_resize(self) -> None:
        """Draws the screen anew if its width has changed: some terminals have then broken the
        lines otherwise, and others not, so that nothing tells where they are."""
        if self._console.width == self._width:
            return
        self._width = self._console.width
        room = self._console.height - len(self._region().renderables)
        shown: list[str] = []
        for line in reversed(self._lines):
            room -= max(1, math.ceil(cell_len(line.expandtabs(_TAB_CELLS)) / self._width))
            if room < 0:
                break
            shown.insert(0, line)
        with self._console:
            self._console.clear()
            self._print(shown)

    def __enter__(self) -> BlockDisplay:
        self._begun = self._clock()
        self._live.start(refresh=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._after_resize()
        self._live.stop()
        # What is said of an error begins a line.
        ended = "\n" if kind is not None and self._tail else ""
        self._console.file.write(visible(self._tail.replace("\r\n", "\n")) + ended)
        self._console.file.flush()


def glyphs_of(encoding: str) -> tuple[str, str]:
    """Signs of a masked and of a filled position that the terminal's encoding has."""
    try:
        (MASKED + FILLED).encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return MASKED_ASCII, FILLED_ASCII
    return MASKED, FILLED


def shade(confidence: float) -> str:
    """The style of a provisional token, from dim to bright."""
    return next((style for least, style in SHADES if confidence >= least), SHADES[-1][1])


def pieces_of(
    block: Provisional, before: Sequence[int], decode: Decode | None, glyphs: tuple[str, str]
) -> Pieces:
    """Text and style of each position, after the tokens `before`; glyphs (masked, filled) for
    those that have no text."""
    found: Pieces = []
    positions = list(zip(block.token_ids, block.masked, block.confidences, strict=True))
    for known, run in groupby(positions, lambda one: not one[1] or one[2] > 0.0):
        if not known:
            found.extend((glyphs[0], MASK_STYLE) for _ in run)
            continue
        ids, _, confidences = zip(*run, strict=True)
        texts = _texts(ids, before, decode) if decode is not None else iter([""] * len(ids))
        for text, confidence in zip(texts, confidences, strict=True):
            found.append((text or glyphs[1], shade(confidence)))
    return found


def _texts(ids: Sequence[int], before: Sequence[int], decode: Decode) -> Iterator[str]:
    """The text that each id adds; none until the last byte of a character."""
    tokens = list(before)
    shown = decode(tokens).rstrip("\ufffd") if tokens else ""
    for token in ids:
        tokens.append(token)
        text = decode(tokens).rstrip("\ufffd")
        yield text[len(shown) :]
        shown = text


def folded(text: Text, width: int) -> list[Text]:
    """The rows of a text as a terminal breaks it: at `width` cells, wherever that is."""
    rows: list[Text] = []
    for line in text.split("\n", allow_blank=True):
        line.expand_tabs(_TAB_CELLS)
        ends = list(accumulate(len(part) for part in chop_cells(line.plain, width)))
        rows.extend(line.divide(ends[:-1]))
    for row in rows:
        row.no_wrap, row.overflow = True, "crop"
    return rows


def visible(text: str) -> str:
    """The text with control characters by their numbers: a model may write any, and a terminal
    obeys them."""
    if text.isprintable():
        return text
    return "".join(
        ascii(one)[1:-1] if category(one) in ("Cc", "Zl", "Zp") and one not in "\t\n" else one
        for one in text
    )
