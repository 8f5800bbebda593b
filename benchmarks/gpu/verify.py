"""Replays a recorded folder on a device: `python -m benchmarks.gpu.verify --folder tiny_a`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from twotower.towers.verify import verify_folder

GOLDEN = Path(__file__).parents[2] / "tests" / "golden"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--kinds", nargs="*", default=(), help="kinds of cases; all without")
    parser.add_argument("--folder", nargs="+", required=True)
    args = parser.parse_args()
    results = [verify_folder(GOLDEN / name, args.device, kinds=args.kinds) for name in args.folder]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main())
