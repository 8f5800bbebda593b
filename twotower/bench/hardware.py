"""What a figure was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from twotower.kernels.products import products
from twotower.towers.limits import usable_cpus


def hardware(device: torch.device) -> dict[str, str | int | float]:
    """The device, its memory in GiB, the host's processor and its products, and versions."""
    own: dict[str, str | int | float] = {
        "device": "CPU",
        "cpu": _cpu(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "products": products(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        own |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return own


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
