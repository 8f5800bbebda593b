"""Short chaos runs on a cluster of several nodes; kills of single processes are in
`test_recovery.py`, long runs in `make chaos`."""

from __future__ import annotations

import pytest

from benchmarks.chaos import run

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]


DISTURBANCES = ("node killed", "context tower hung", "denoiser tower hung", "link cut", "link slow")


def test_every_stream_ends_with_the_tokens_of_the_undisturbed_run() -> None:
    rounds = run(DISTURBANCES, streams=8, tokens=48, rounds=1)
    assert [one.disturbance for one in rounds] == list(DISTURBANCES)
    for one in rounds:
        print(f"{one.disturbance}: longest pause {one.longest_pause_s} s, all in {one.seconds} s")
        assert one.running > 0
        assert one.wrong == 0
        assert one.left == 0
