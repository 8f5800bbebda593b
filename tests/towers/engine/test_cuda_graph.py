"""Work over fixed buffers, where there is no CUDA to capture it."""

from __future__ import annotations

import torch

from twotower.towers.engine.cuda_graph import CapturedGraph, GraphMemory, Staging

CPU = torch.device("cpu")


def test_without_cuda_work_is_called_and_never_run_to_be_captured() -> None:
    calls: list[int] = []
    work = CapturedGraph(lambda: calls.append(1), GraphMemory(CPU))
    assert work.ready
    work.capture()
    assert calls == []
    work()
    work()
    assert calls == [1, 1]


def test_staging_pads_what_is_not_sent() -> None:
    staging = Staging(("slot", "key", "token"), 4, CPU)
    staging.send({"slot": -1}, slot=[3, 1], key=[2**62, -5, 7], token=[1, 2, 3, 4])
    assert staging["slot"].tolist() == [3, 1, -1, -1]
    assert staging["key"].tolist() == [2**62, -5, 7, 0]
    staging.send({"slot": -1}, slot=[2])
    assert [staging[name].tolist() for name in ("slot", "token")] == [[2, -1, -1, -1], [0] * 4]
