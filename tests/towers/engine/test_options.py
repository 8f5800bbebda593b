"""Rules, defaults by device, and the memory that is reserved for passes."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from twotower.planner.shapes import LARGE
from twotower.towers.engine import options as module
from twotower.towers.engine.options import EngineOptions, PassLimits
from twotower.towers.engine.pass_memory import working_bytes
from twotower.towers.errors import ConfigError
from twotower.towers.model.backbone import Tower

BF16 = torch.bfloat16
MIB = 1 << 20


def without_defaults() -> list[str]:
    return [field.name for field in fields(EngineOptions) if field.name != "memory_fraction"]


@pytest.mark.parametrize("field", without_defaults())
def test_a_value_below_the_least_is_refused(field: str) -> None:
    least = 0 if field in ("max_queued_requests", "prefix_cache_mib") else 1
    EngineOptions(**{field: least})
    with pytest.raises(ConfigError, match=f"^{field}: got {least - 1}, expected at least {least}$"):
        EngineOptions(**{field: least - 1})


@pytest.mark.parametrize("fraction", [0.0, 1.5, float("nan")])
def test_a_share_of_memory_is_above_0_and_at_most_1(fraction: float) -> None:
    EngineOptions(memory_fraction=1.0)
    with pytest.raises(ConfigError, match=f"^memory_fraction: got {fraction}, expected above 0"):
        EngineOptions(memory_fraction=fraction)


def test_the_device_decides_what_is_not_given() -> None:
    free = EngineOptions()
    assert free.pass_limits("cpu") == PassLimits(512, 256)
    assert free.pass_limits("cuda") == PassLimits(4096, 1024)
    assert (free.prefill_chunk_on("cpu"), free.prefill_chunk_on("cuda")) == (256, 1024)
    given = EngineOptions(
        max_num_batched_tokens=7, max_prefill_tokens=5, max_rows_per_pass=3, prefill_chunk=9
    )
    assert given.pass_limits("cuda") == PassLimits(7, 5, 3)
    assert given.prefill_chunk_on("cuda") == 9


class OnDevice(Tower):
    """A tower that says on which device it is."""

    def __init__(self, device: str, *, reads_prompts: bool) -> None:
        self.config, self.dtype = LARGE, BF16
        self.device, self.reads_prompts = torch.device(device), reads_prompts


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What pools are asked for, in place of the pools."""
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(module, "pool_for", lambda *_, **given: asked.append(given))
    return asked


def test_a_pool_has_the_share_of_its_device(asked: list[dict[str, Any]]) -> None:
    cpu, cuda = (OnDevice(device, reads_prompts=False) for device in ("cpu", "cuda"))
    EngineOptions().pool_for(cpu)
    EngineOptions().pool_for(cuda)
    EngineOptions(memory_fraction=0.5, max_num_seqs=3, max_context=9).pool_for(cuda)
    assert [each["memory_fraction"] for each in asked] == [0.25, 0.95, 0.5]
    assert (asked[2]["max_num_seqs"], asked[2]["max_context"]) == (3, 9)
    assert asked[0]["reserved"] == 0


def test_a_pool_leaves_room_for_the_passes_of_all_towers_that_read_it(
    asked: list[dict[str, Any]],
) -> None:
    options = EngineOptions(max_num_seqs=64, prefix_cache_mib=3)
    context, denoiser = (OnDevice("cuda", reads_prompts=reads) for reads in (True, False))
    options.pool_for(context)
    options.pool_for(denoiser)
    options.pool_for(context, denoiser)
    small = replace(options, max_num_batched_tokens=512, max_prefill_tokens=64)
    small.pool_for(denoiser)
    options.pool_for(context, mirrored=True)
    EngineOptions().pool_for(OnDevice("cpu", reads_prompts=True), mirrored=True)
    first, second, both, least, mirrored, on_cpu = (each["reserved"] for each in asked)
    assert first == 3 * MIB + working_bytes(LARGE, BF16, 5120, 64, reads_prompts=True)
    assert second == working_bytes(LARGE, BF16, 4096, 64, reads_prompts=False)
    assert both == first + second
    assert least == working_bytes(LARGE, BF16, 512, 64, reads_prompts=False)
    # Of 87 tokens a delta is smaller than a snapshot of 3 * 6144 + 64 * 64 * 128 values a layer.
    assert mirrored == first + 64 * 87 * 23 * (6144 + 64) * 2
    assert on_cpu == 0
