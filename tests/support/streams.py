"""Streams of all modes at once from a running service that is disturbed under them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from twotower import GenerationResult, TwoTower
from twotower.client import Client, Usage

WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "mask_diffusion"},
    {"mode": "ar"},
    {"mode": "verified"},
    {"mode": "mask_diffusion", "commit_rule": "released"},
    {"mode": "mock_ar"},
    {"mode": "verified", "draft_source": "denoiser"},
    {"mode": "auto"},
    {"mode": "verified", "acceptance": "mix"},
    {"mode": "verified", "acceptance": "mix", "draft_source": "denoiser", "mix_ratio": 0.6},
)
TEXTS = ("def main():\n    ", "class Reader:\n", "import os\nimport sys\n", "# the first", "x = [")
Request = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Stream:
    """What a client saw of one stream; gapless if each block began where the last had ended.

    `starts` of the blocks count from the output's first token.
    """

    token_ids: list[int]
    text: str
    starts: list[int]
    indexes: list[int]
    gapless: bool
    usage: Usage | None
    longest_pause_s: float
    resumes: int


def requests_of(count: int, tokens: int) -> list[Request]:
    """Requests of all modes and ways to draft, every other one drawn at a temperature."""
    requests = []
    for index in range(count):
        way = WAYS[index % len(WAYS)]
        length = tokens // 3 if way["mode"] == "mock_ar" else tokens
        drawn = {"temperature": float(index % 2), "seed": index}
        options = {**way, "max_tokens": length, "block_size": 8, **drawn}
        requests.append((TEXTS[index % len(TEXTS)], options))
    return requests


def alone(requests: Sequence[Request]) -> list[GenerationResult]:
    """The result of each request in one process, undisturbed."""
    model = TwoTower.from_pretrained()
    return [model.generate([text], **options)[0] for text, options in requests]


def receive(address: str, request: Request, seen: list[int], timeout_s: float = 300.0) -> Stream:
    """One stream, by a client of its own; each block's index goes into `seen` as it comes."""
    text, options = request
    with Client(address) as client:
        stream = client.generate(text, ignore_eos=True, timeout=timeout_s, **options)
        last, longest = time.monotonic(), 0.0
        blocks = []
        for block in stream:
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            blocks.append(block)
            seen.append(block.index)
        return Stream(
            stream.token_ids,
            "".join(block.text for block in blocks),
            [block.start - (stream.prompt_tokens or 0) for block in blocks],
            [block.index for block in blocks],
            all(a.start + len(a.token_ids) == b.start for a, b in pairwise(blocks)),
            stream.usage,
            longest,
            stream.resumes,
        )


def disturbed(
    address: str,
    requests: Sequence[Request],
    draw: random.Random,
    disturb: Callable[[], None],
    timeout_s: float = 300.0,
) -> tuple[list[Stream], int]:
    """The streams of all requests at once, and how many were running at the disturbance, which
    comes after a random number of blocks."""
    seen: list[int] = []
    with ThreadPoolExecutor(len(requests)) as pool:
        streams = [pool.submit(receive, address, one, seen, timeout_s) for one in requests]
        # In blocks: in seconds a fast machine would be done before.
        moment = draw.randrange(4 * len(requests))
        while len(seen) < moment and not all(stream.done() for stream in streams):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.05))
        running = sum(not stream.done() for stream in streams)
        disturb()
        return [stream.result(timeout=timeout_s) for stream in streams], running
