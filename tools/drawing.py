"""Draws docs/processes.svg and docs/wings.svg.

`python -m tools.drawing` writes, `... --check` compares and exits with 1 on a difference. The
processes are described here; the wings are read from the table of tests/test_layering.py.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from graphlib import TopologicalSorter
from pathlib import Path

from tests.test_layering import WINGS, WORDS
from tools.svg import Arrow, Box, Frame, drawing

FOLDER = Path(__file__).resolve().parents[1] / "docs"
SERVING, TOWER, STARTING = "#dbeafe", "#dcfce7", "#f3f4f6"
# Colours of the wings, by their top folder; the last is that of `twotower/` itself.
FOLDERS = {
    "kernels": "#fee2e2",
    "towers": "#dcfce7",
    "protos": "#fef9c3",
    "cluster": "#e0e7ff",
    "deployments": "#dbeafe",
    "twotower": "#f3e8ff",
}
# Folders that stand below one another, from left to right; the last lane has all others.
LANES = (("kernels", "towers"), ("protos", "cluster", "deployments"), ())
WING_WIDTH, WING_HEIGHT, GAP, FLOOR, SHIFT = 190, 26, 16, 62, 30


def processes() -> str:
    """The processes of a service, and what goes between them."""
    client = Box(20, 60, 120, 70, "client", ["any gRPC library"])
    proxy = Box(225, 60, 140, 70, "Serve's proxy", ["one per node"], SERVING)
    router = Box(450, 40, 160, 110, "Router", _ROUTER, SERVING)
    frame = Frame(730, 14, 400, 366, "a pair: one replica and its placement group")
    pair = Box(750, 44, 360, 70, "TowerPair", ["the block loop of each request"], SERVING)
    context = Box(750, 250, 140, 100, "context tower", ["actor, one engine", *_STATE], TOWER)
    denoiser = Box(970, 250, 140, 100, "denoiser tower", ["actor(s)", "mirrors of states"], TOWER)
    host = Frame(20, 220, 590, 160, "twotower serve, on one machine")
    supervisor = Box(40, 260, 200, 90, "supervisor", _SUPERVISOR, STARTING)
    server = Box(330, 260, 260, 90, "its child", _SERVER, STARTING)
    arrows = [
        Arrow([client.right, proxy.left], ["gRPC"]),
        Arrow([proxy.right, router.left], ["Ray call"]),
        Arrow([router.right, (750, 95)], ["Ray call; blocks", "stream back"], (670, 66)),
        Arrow([(820, 114), context.top], ["open, prefill,", "extend, verify"], (828, 178), "start"),
        Arrow([(1040, 114), denoiser.top], ["open,", "denoise", "block"], (1048, 170), "start"),
        Arrow([context.right, denoiser.left], ["state:", "gRPC, gloo", "or NCCL"], (930, 262)),
        Arrow([supervisor.right, server.left], ["starts,", "watches"], (285, 282), dashed=True),
        Arrow([(530, 260), (530, 150)], ["deploys"], (538, 200), "start", dashed=True),
    ]
    boxes = [frame, host, client, proxy, router, pair, context, denoiser, supervisor, server]
    return drawing(1150, 400, "Processes of a TwoTower service", [*boxes, *arrows])


_ROUTER = ["checks, admits,", "chooses a pair,", "keeps the log of", "committed blocks"]
_STATE = ["states of rows:", "slots and pages"]
_SUPERVISOR = ["holds no Ray; signals,", "watches Ray's processes,", "ends what is left"]
_SERVER = ["starts a Ray cluster of this", "machine and deploys Router", "and TowerPair"]


def wings() -> str:
    """The wings by floors, each above all that it uses; arrows that follow from others are left
    out, and so are those to the words that every wing may use."""
    words = WORDS.split()
    uses = {wing: set(used.split()) for wing, used in WINGS.items() if wing not in words}
    floors = _floors(uses)
    places, width = _places(floors)
    height = (max(floors.values()) + 2) * FLOOR + GAP
    boxes = {
        wing: Box(x, height - (floors[wing] + 2) * FLOOR, WING_WIDTH, WING_HEIGHT, wing)
        for wing, x in places.items()
    }
    boxes = {wing: replace(box, fill=_color(wing)) for wing, box in boxes.items()}
    ground = Box(GAP, height - FLOOR, width - 2 * GAP, 44, "for every wing", [", ".join(words)])
    arrows = [
        Arrow([boxes[wing].bottom, boxes[used].top])
        for wing, near in _reduced(uses).items()
        for used in sorted(near)
    ]
    return drawing(width, height, "Wings and what they use", [*arrows, ground, *boxes.values()])


def _places(floors: Mapping[str, int]) -> tuple[dict[str, float], float]:
    """The left edge of each wing, in the lane of its folder, and the width of all lanes."""
    places: dict[str, float] = {}
    left: float = GAP
    for lane in LANES:
        inside = [wing for wing in floors if (wing.split("/")[0] in lane) or (not lane)]
        rows: dict[int, list[str]] = {}
        for wing in inside:
            if wing not in places:
                rows.setdefault(floors[wing], []).append(wing)
        most = max(map(len, rows.values()))
        for floor, row in rows.items():
            # Every other floor a little to the right: an arrow past a wing does not run through it.
            start = left + (most - len(row)) * (WING_WIDTH + GAP) / 2 + floor % 2 * SHIFT
            places |= {wing: start + at * (WING_WIDTH + GAP) for at, wing in enumerate(row)}
        left += most * (WING_WIDTH + GAP) + GAP + SHIFT
    return places, left


def _floors(uses: Mapping[str, set[str]]) -> dict[str, int]:
    """For each wing the number of wings below it on the longest way down."""
    floors: dict[str, int] = {}
    for wing in TopologicalSorter(uses).static_order():
        floors[wing] = max((floors[used] + 1 for used in uses[wing]), default=0)
    return floors


def _reduced(uses: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """The wings that each wing uses, without those that follow from another that it uses."""
    below: dict[str, set[str]] = {}
    for wing in TopologicalSorter(uses).static_order():
        below[wing] = uses[wing].union(*(below[used] for used in uses[wing]))
    return {
        wing: used - set().union(*(below[other] for other in used)) for wing, used in uses.items()
    }


def _color(wing: str) -> str:
    return FOLDERS.get(wing.split("/")[0], FOLDERS["twotower"])


PICTURES = {"processes.svg": processes, "wings.svg": wings}


def main(arguments: list[str]) -> int:
    """Writes or, with `--check`, compares; returns the exit code."""
    stale = []
    for name, draw in PICTURES.items():
        path, text = FOLDER / name, draw()
        if arguments != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
    for name in stale:
        print(f"docs/{name}: differs from its description; run make drawings")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
