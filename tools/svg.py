"""Boxes, frames and arrows as an SVG, from a short description; needs no library and no fonts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

INK, PALE = "#1f2937", "#6b7280"
LINE, TITLE_SIZE, TEXT_SIZE = 16, 14, 12
Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A titled box with lines of text, coordinates of its upper left corner in pixels."""

    x: float
    y: float
    width: float
    height: float
    title: str
    lines: Sequence[str] = ()
    fill: str = "#ffffff"

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    def svg(self) -> str:
        """The box with its text centred, the title first."""
        first = self.y + self.height / 2 - len(self.lines) * LINE / 2 + TITLE_SIZE / 3
        middle = self.x + self.width / 2
        texts = [_text(middle, first, self.title, TITLE_SIZE, INK, "middle", bold=True)]
        for number, line in enumerate(self.lines, 1):
            texts.append(_text(middle, first + number * LINE, line, TEXT_SIZE, INK, "middle"))
        return _rectangle(self, self.fill, INK) + "".join(texts)


@dataclass(frozen=True)
class Frame(Box):
    """A dashed frame around boxes, its title in the upper left corner."""

    def svg(self) -> str:
        """The frame; `lines` are not drawn."""
        title = _text(self.x + 10, self.y + 18, self.title, TEXT_SIZE, PALE, "start")
        return _rectangle(self, self.fill, PALE, dashed=True) + title


@dataclass(frozen=True)
class Arrow:
    """An arrow along points; its label stands at `at`, or at the middle of the first stretch."""

    points: Sequence[Point]
    label: Sequence[str] = ()
    at: Point | None = None
    anchor: str = "middle"
    dashed: bool = False

    def svg(self) -> str:
        """The line with its head, and the lines of the label below one another."""
        path = " ".join(f"{x:g},{y:g}" for x, y in self.points)
        dash = ' stroke-dasharray="5 4"' if self.dashed else ""
        color = PALE if self.dashed else INK
        line = (
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.4"{dash} '
            'marker-end="url(#head)"/>\n'
        )
        (x1, y1), (x2, y2) = self.points[:2]
        x, y = self.at or ((x1 + x2) / 2, (y1 + y2) / 2 - 6)
        lines = enumerate(self.label)
        texts = [_text(x, y + i * LINE, label, TEXT_SIZE, PALE, self.anchor) for i, label in lines]
        return line + "".join(texts)


def drawing(width: float, height: float, title: str, parts: Iterable[Box | Arrow]) -> str:
    """The whole file; parts are drawn in their order."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" font-family="Helvetica, Arial, sans-serif" '
        f'role="img">\n<title>{escape(title)}</title>\n'
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0,0 L8,4 L0,8 z" '
        f'fill="{INK}"/></marker></defs>\n'
        f'<rect width="{width:g}" height="{height:g}" fill="#ffffff"/>\n'
    )
    return head + "".join(part.svg() for part in parts) + "</svg>\n"


def _rectangle(box: Box, fill: str, ink: str, *, dashed: bool = False) -> str:
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    return (
        f'<rect x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" height="{box.height:g}" rx="6" '
        f'fill="{fill}" stroke="{ink}"{dash}/>\n'
    )


def _text(
    x: float, y: float, text: str, size: int, ink: str, anchor: str, *, bold: bool = False
) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{ink}" text-anchor="{anchor}"'
        f"{weight}>{escape(text)}</text>\n"
    )
