"""Clocks and ceilings on the machine at hand."""

from __future__ import annotations

import time

import torch

from tests.bench.conftest import CPU
from twotower.bench.hardware import hardware
from twotower.bench.timing import (
    Stopwatch,
    fp8_product_flops,
    measure_ceilings,
    median_seconds,
)
from twotower.kernels.products import force_products, products


def test_the_median_of_calls_leaves_warm_ups_out() -> None:
    calls = []

    def work() -> None:
        calls.append(None)
        # A warm-up that takes longer than all else together.
        time.sleep(0.2 if len(calls) <= 2 else 0.01)

    seconds = median_seconds(work, CPU, 5)
    assert len(calls) == 7
    assert 0.01 <= seconds < 0.2


def test_marks_are_in_order() -> None:
    watch = Stopwatch(CPU)
    first, second = watch.mark(), watch.mark()
    time.sleep(0.01)
    third = watch.mark()
    assert watch.seconds(first, third) >= watch.seconds(second, third) >= 0.01


def test_ceilings_are_those_of_a_machine() -> None:
    """From a very slow one to more than any has."""
    found = measure_ceilings(CPU, torch.float32)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.matmul_flops < 1e15
    assert 1e8 < found.wide_flops < 1e15


def test_the_hardware_is_named() -> None:
    own = hardware(CPU)
    assert own["device"] == "CPU"
    assert own["torch"] == torch.__version__
    assert int(own["cores"]) >= 1
    assert own["cpu"]
    assert own["products"] == products()
    with force_products("plain"):
        assert hardware(CPU)["products"] == "plain"


def test_products_in_8_bits_are_measured_on_a_gpu_alone() -> None:
    """Here the product itself is tried, so that a GPU's run does not meet a wrong call first."""
    assert measure_ceilings(CPU, torch.float32).fp8_flops is None
    assert fp8_product_flops(CPU, 64) > 0
