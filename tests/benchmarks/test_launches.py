"""The number of launches of every pass at the 30B pattern, which may fall and not rise unseen."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu import launches
from benchmarks.gpu.launches import KINDS, Bench, narrow_preset, recording
from twotower.kernels import dispatch

# By kind and rows. docs/performance.md has the table; whoever lowers a number lowers it here.
MOST = {
    "denoise": {1: 299, 16: 322},
    "ar": {1: 279, 16: 279},
    "extend": {1: 297, 16: 320},
    "draft": {1: 310, 16: 333},
    "prefill": {1: 366, 16: 381},
}


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench.of(narrow_preset(), 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 16])
def test_a_pass_has_no_more_launches_than_it_had(bench: Bench, kind: str, rows: int) -> None:
    assert bench.count(kind, rows).total() <= MOST[kind][rows]


def test_a_pass_by_the_references_has_far_more(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is counted is what runs: without kernels every operator of torch counts."""
    monkeypatch.setattr(launches, "force", lambda _: dispatch.force("reference"))
    assert bench.count("ar", 1).total() > 3 * MOST["ar"][1]


def test_views_and_allocations_are_no_launches_and_products_are_one() -> None:
    with recording(graphs_only=False) as found:
        x = torch.empty(3, 4).view(2, 6).transpose(0, 1)
        y = x.contiguous() + 1
        dispatch.linear(y[:, :2], torch.ones(5, 2))
        y[0].zero_()
    assert dict(found) == {"clone": 1, "add": 1, "product": 1, "ones": 1, "zero_": 1}
