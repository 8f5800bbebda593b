"""What a figure was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

from twotower.towers.limits import usable_cpus


def machine(threads: int) -> dict[str, str | int]:
    """Processor, its cores, threads that compute, and the version of torch."""
    return {
        "cpu": _cpu(),
        "cores": usable_cpus(),
        "threads": threads,
        "torch": torch.__version__,
    }


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
