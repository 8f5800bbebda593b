"""Ceilings of a GPU, its driver and the installed packages:
`python -m benchmarks.gpu.ceilings --out FILE`."""

from __future__ import annotations

import argparse
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import torch

from twotower.bench.hardware import hardware, package_version
from twotower.bench.timing import measure_ceilings, median_seconds

_PACKAGES = ("torch", "triton", "transformers", "safetensors", "numpy", "pytest", "scipy")
_DOUBLE_SIDE = {"cuda": 4096, "cpu": 256}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    device = torch.device(args.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    found = {
        "hardware": hardware(device),
        "packages": {name: package_version(name) for name in _PACKAGES},
        "driver": _driver(device),
        "ceilings": asdict(measure_ceilings(device, dtype)),
        "fp64_flops": _double_flops(device),
    }
    args.out.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print(json.dumps(found, indent=1))


def _driver(device: torch.device) -> str:
    """Name, driver, memory and clocks of the GPU as nvidia-smi prints them; empty on a CPU."""
    if device.type != "cuda":
        return ""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem"]
    done = subprocess.run(
        [*query, "--format=csv,noheader"], capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip()


def _double_flops(device: torch.device) -> float:
    """FLOP/s of a product in fp64, in which the router's choice is computed."""
    side = _DOUBLE_SIDE[device.type]
    left = torch.randn(side, side, device=device, dtype=torch.float64)
    out = torch.empty_like(left)
    return 2.0 * side**3 / median_seconds(lambda: torch.mm(left, left, out=out), device, 3)


if __name__ == "__main__":
    main()
