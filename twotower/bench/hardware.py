"""The hardware and versions that a figure was measured on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from twotower.kernels.products import products
from twotower.towers.limits import usable_cpus


def hardware(device: torch.device) -> dict[str, str | int | float]:
    """The device and its memory in GiB, the host's processor, cores, threads and kind of matrix
    products, and versions of packages."""
    found: dict[str, str | int | float] = {
        "device": "CPU",
        "cpu": cpu_name(),
        "cores": usable_cpus(),
        "threads": torch.get_num_threads(),
        "products": products(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": str(torch.version.cuda),
        }
    return found


def package_version(package: str) -> str:
    """The installed version of a package, or "none"."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def cpu_name() -> str:
    """The processor's model name, or the machine's architecture where the system has none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
