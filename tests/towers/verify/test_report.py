"""A report of compared numbers."""

from __future__ import annotations

import torch

from twotower.towers.verify import CaseReport


def test_a_report_sees_nan_and_shapes() -> None:
    report = CaseReport("id", "kind")
    report.close("a", torch.tensor([float("nan")]), torch.tensor([1.0]), 1e-3)
    report.close("b", torch.zeros(2), torch.zeros(3), 1e-3)
    report.close("c", torch.zeros(2), torch.full((2,), 9e-4), 1e-3)
    report.same("d", [1], [2])
    assert report.checks == 4
    assert [miss.split(":")[0] for miss in report.misses] == ["a", "b", "d"]
    assert report.line().startswith("MISS kind")
