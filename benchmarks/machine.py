"""The machine that a figure was measured on."""

from __future__ import annotations

import torch

from twotower.bench.hardware import cpu_name
from twotower.towers.limits import usable_cpus


def machine(threads: int) -> dict[str, str | int]:
    """Processor, cores, number of threads that compute, and version of torch."""
    return {
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "threads": threads,
        "torch": torch.__version__,
    }
