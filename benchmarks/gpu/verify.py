"""Replays a recorded folder on a device: `python -m benchmarks.gpu.verify --device cuda tiny_a`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from twotower.towers.verify import verify_folder

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("folders", nargs="+")
    args = parser.parse_args()
    results = [verify_folder(GOLDEN / name, args.device) for name in args.folders]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
