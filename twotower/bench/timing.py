"""Times of work on a device, and the device's ceilings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from twotower.kernels.quantized import FP8
from twotower.planner.floors import Ceilings

# Copies larger than a GPU's caches and products that fill it; on a CPU they would take too long.
_COPY_BYTES = {"cuda": 4 << 30, "cpu": 64 << 20}
_PRODUCT_SIDE = {"cuda": 8192, "cpu": 768}
_REPEATS = {"cuda": 10, "cpu": 3}
_WARM_UPS = 2
_FP8_CAPABILITY = (8, 9)
_CALLS_OF_GRAPH = 20


class Stopwatch:
    """Marks moments in the order of a device's work: events on CUDA, the host's clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.cuda.Event | float] = []

    def mark(self) -> int:
        """Marks the present moment; returns the mark's number."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())
        return len(self._marks) - 1

    def seconds(self, first: int, last: int) -> float:
        """Seconds between two marks; waits for the device."""
        begin, end = self._marks[first], self._marks[last]
        if isinstance(begin, torch.cuda.Event):
            assert isinstance(end, torch.cuda.Event)
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3
        assert isinstance(end, float)
        return end - begin


def synchronize(device: torch.device) -> None:
    """Waits for all work of a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_seconds(work: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Median seconds of a call. Each begins on an idle device, so launches that the device waits
    for count."""
    for _ in range(_WARM_UPS):
        work()
    times = []
    for _ in range(repeats):
        synchronize(device)
        watch = Stopwatch(device)
        begin = watch.mark()
        work()
        times.append(watch.seconds(begin, watch.mark()))
    return statistics.median(times)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measures the copy bandwidth, and the rates of a large product in `dtype`, in fp32, and in 8
    bits on a GPU that has such products."""
    side = _PRODUCT_SIDE[device.type]
    return Ceilings(
        _copy_bytes_per_s(device),
        _product_flops(device, dtype, side),
        _product_flops(device, torch.float32, side),
        fp8_product_flops(device, side) if _multiplies_fp8(device) else None,
    )


def _multiplies_fp8(device: torch.device) -> bool:
    """True for a GPU with products of e4m3 values, if this torch has them."""
    if device.type != "cuda" or not hasattr(torch, "_scaled_mm"):
        return False
    return torch.cuda.get_device_capability(device) >= _FP8_CAPABILITY


def fp8_product_flops(device: torch.device, side: int) -> float:
    """FLOP/s of a product of e4m3 values that is summed in fp32, as the experts' kernel sums it."""
    left, right = (torch.randn(side, side, device=device).to(FP8) for _ in range(2))
    scale = torch.ones((), device=device)

    def product() -> Tensor:
        # Rows of `right` are columns of the product: both operands lie along the inner length.
        return torch._scaled_mm(
            left, right.T, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=False
        )

    return 2.0 * side**3 / median_seconds(product, device, _REPEATS[device.type])


def _copy_bytes_per_s(device: torch.device) -> float:
    source = torch.empty(_COPY_BYTES[device.type] // 4, device=device).normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, _REPEATS[device.type])
    return 2 * source.nbytes / seconds


def _product_flops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(left)

    def product() -> Tensor:
        return torch.mm(left, right, out=out)

    return 2.0 * side**3 / median_seconds(product, device, _REPEATS[device.type])


def launch_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, from a graph of many, so that they include no launch by the host."""
    for _ in range(3):
        work()
    if device.type != "cuda":
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_CALLS_OF_GRAPH):
            work()
    times = []
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)) / 1e3 / _CALLS_OF_GRAPH)
    return statistics.median(times)
