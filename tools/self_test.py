"""Writes the recording of the device self-test, towers/verify/self_test.safetensors.

`python -m tools.self_test` writes, `... --check` compares with the committed file and exits with 1
on a difference. The passes run on a CPU with the references, in fp32. Before anything is written,
the tokens that they draw have to be the same in bf16, with experts in 8 bits and under noise as
large as the limits allow: a choice that rounding decides would refuse devices that work.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from twotower.kernels import dispatch
from twotower.towers.verify.formula_model import formula_towers
from twotower.towers.verify.on_device import LIMITS, RECORDING, sampled, self_test
from twotower.towers.verify.recorded_passes import run_passes
from twotower.towers.verify.report import CaseReport

CPU = torch.device("cpu")
SEEDS = 8
# Of a norm's output, relative to itself.
ROUNDED_OFF = 2.0**-8
# Of what may differ between a recording and another processor's.
TOLERANCE = 1e-4


class Recording:
    """What the passes compute, by name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def near(self, name: str, got: Tensor) -> None:
        self.tensors[name] = sampled(got)

    def same(self, name: str, got: Sequence[int]) -> None:
        self.tensors[name] = torch.tensor(list(got), dtype=torch.int64)


def record(dtype: torch.dtype = torch.float32, *, quantized: bool = False) -> dict[str, Tensor]:
    """All tensors of a run on this processor."""
    recording = Recording()
    run_passes(*formula_towers(CPU, dtype, quantized), recording)
    return recording.tensors


def choices(tensors: dict[str, Tensor]) -> dict[str, list[int]]:
    """What was drawn and committed."""
    return {name: value.tolist() for name, value in tensors.items() if value.dtype == torch.int64}


@contextmanager
def watched_routes(unsteady: set[int]) -> Iterator[None]:
    """Adds to `unsteady` the numbers of the calls in which noise, as large as what bf16 rounds off,
    lets a token go to other experts."""
    generator = torch.Generator().manual_seed(0)
    route, calls = dispatch.route.reference, count()

    def watched(x: Tensor, *others: Any) -> Any:
        ids, weights = route(x, *others)
        call, chosen = next(calls), ids.sort(dim=1).values
        for _ in range(SEEDS):
            noise = 1 + ROUNDED_OFF * torch.randn(x.shape, generator=generator)
            if not torch.equal(route(x * noise, *others)[0].sort(dim=1).values, chosen):
                unsteady.add(call)
        return ids, weights

    dispatch.route.reference = watched
    try:
        yield
    finally:
        dispatch.route.reference = route


@contextmanager
def noisy_logits(seed: int) -> Iterator[None]:
    """Logits that are off by as much as the limit of bf16 allows."""
    generator = torch.Generator().manual_seed(seed)
    predict = dispatch.predict.reference

    def noisy(logits: Tensor, *others: Any) -> Any:
        size = logits.square().mean().sqrt() * LIMITS[torch.bfloat16]
        return predict(logits + size * torch.randn(logits.shape, generator=generator), *others)

    dispatch.predict.reference = noisy
    try:
        yield
    finally:
        dispatch.predict.reference = predict


def unsteady(want: dict[str, Tensor]) -> list[str]:
    """Names of the choices that rounding decides."""
    found = [record(torch.bfloat16), record(torch.bfloat16, quantized=True)]
    for seed in range(SEEDS):
        with noisy_logits(seed):
            found.append(record())
    wanted = choices(want)
    return sorted(
        {name for other in found for name, got in choices(other).items() if got != wanted[name]}
    )


def differences(old: dict[str, Tensor], new: dict[str, Tensor]) -> list[str]:
    """What of a recording is not what is computed now."""
    report = CaseReport("recording", "self-test")
    report.same("names", sorted(new), sorted(old))
    for name in sorted(set(old) & set(new)):
        if new[name].dtype == torch.int64:
            report.same(name, new[name].tolist(), old[name].tolist())
        else:
            report.near(name, new[name], old[name], TOLERANCE)
    return report.misses


def main(arguments: Sequence[str]) -> int:
    """Writes the recording, or compares it."""
    torch.set_num_threads(1)
    routes: set[int] = set()
    with watched_routes(routes):
        new = record()
    if "--check" in arguments:
        misses = differences(load_file(RECORDING), new)
        print("\n".join(misses) or f"{RECORDING.name} is up to date")
        return int(bool(misses))
    if routes:
        print(f"rounding decides the experts of calls {sorted(routes)}: choose other tokens")
        return 1
    if names := unsteady(new):
        print(f"rounding decides {', '.join(names)}: choose another key or other tokens")
        return 1
    save_file(new, RECORDING)
    print(f"{RECORDING.name}: {len(new)} tensors, {RECORDING.stat().st_size} bytes")
    for dtype in LIMITS:
        print(f"{dtype}: {self_test(CPU, dtype):.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
