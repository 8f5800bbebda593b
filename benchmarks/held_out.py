"""Held-out prompts as a file, for `twotower sweep` and whatever else reads JSONL.

    python -m benchmarks.held_out FILE [--count 200]

A line has `prompt`, `reference` (what follows in the file of the standard library) and `path`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.prompts import completes, held_out_prompts
from twotower.towers.training.corpus import read_corpus, standard_library


def valid_python(prompt: str, output: str, _reference: str | None) -> float:
    """A score for `twotower sweep`: 1 if prompt and output, cut at its last line, tokenize."""
    return float(completes(prompt, output))


def main() -> int:
    """Writes the file; returns the exit code, 1 if there are fewer prompts."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=200)
    args = parser.parse_args()
    found = held_out_prompts(read_corpus(standard_library()), args.count)
    if len(found) < args.count:
        print(f"count: got {args.count}, expected at most {len(found)}", file=sys.stderr)
        return 1
    rows = [
        {"prompt": prompt.text, "reference": prompt.rest, "path": prompt.path} for prompt in found
    ]
    args.file.parent.mkdir(parents=True, exist_ok=True)
    args.file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
