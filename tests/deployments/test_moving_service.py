"""A queue in one pair of a real service, and a second pair that comes up beside it."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.pairs import await_true, held, pair_states, prompt_tokens_read
from twotower import TwoTower
from twotower.client import Client
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.autoscaling import PairAutoscaling
from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

PROMPTS = [list(range(5 + number, 15 + 2 * number)) for number in range(4)]
PLACES = 2
# So many are there at any time until the second pair has loaded, however long that takes.
STREAMS = 16
TOKENS = 256
BLOCK = 8


def test_rows_that_wait_move_to_a_pair_that_comes_up(tiny_text: Path) -> None:
    """Nearly all are asked for while there is one pair: the second has what moves to it."""
    how: dict[str, Any] = {"max_tokens": TOKENS, "block_size": BLOCK, "seed": 3, "temperature": 1.0}
    model = TwoTower.from_pretrained(tiny_text)
    alone = [list(model.generate([prompt], **how)[0].token_ids) for prompt in PROMPTS]
    config = ServiceConfig(
        model=str(tiny_text),
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        cpus_per_tower=0.1,
        max_num_seqs=PLACES,
        prefix_cache_mib=0,
        autoscaling=PairAutoscaling(
            max_pairs=2, target_rows_per_pair=PLACES, smoothing_s=0.0, metrics_interval_s=0.5
        ),
    )

    def ask(number: int) -> tuple[list[int], float, float]:
        with Client(service.address) as client:
            prompt = PROMPTS[number % len(PROMPTS)]
            stream = client.generate(prompt, ignore_eos=True, timeout=240, **how)
            starts, tokens, first = [], [], 0.0
            for block in stream:
                first = first or time.monotonic()
                starts.append(block.index)
                tokens += block.token_ids
        assert starts == list(range(len(starts)))
        return tokens, first, time.monotonic()

    with LocalService(config) as service, ThreadPoolExecutor(STREAMS) as pool:
        asked: list[Future[tuple[list[int], float, float]]] = []

        def kept_busy() -> bool:
            while sum(not one.done() for one in asked) < STREAMS:
                asked.append(pool.submit(ask, len(asked)))
            return pair_states()["RUNNING"] == 2

        loaded = await_true(kept_busy, "no second pair", timeout_s=120)
        second = time.monotonic()
        found = [one.result(timeout=240) for one in asked]
        read = prompt_tokens_read(2)
        await_true(lambda: held(2) == 0, "rows are left", timeout_s=8)
    waited = sum(first > second for _, first, _ in found)
    print(
        f"second pair after {loaded:.1f} s, {waited} of {len(asked)} streams began later, all in "
        f"{max(end for *_, end in found) - second + loaded:.1f} s, prompt tokens by pair {read}"
    )
    assert [tokens for tokens, *_ in found] == [
        alone[number % len(PROMPTS)] for number in range(len(asked))
    ]
    lengths = [len(PROMPTS[number % len(PROMPTS)]) for number in range(len(asked))]
    # More than those two that may have been asked for when both pairs were there.
    assert read[1] > 2 * max(lengths)
    # Each prompt was read once: nobody moved who had a place. But a place may have been given to
    # the next row before the router hears that it was free.
    assert 0 <= sum(read) - sum(lengths) <= 2 * max(lengths)
