"""A task of lm-eval from held-out code: given the lines before, the next line.

    python -m benchmarks.next_line FOLDER [--count N]
    twotower eval --tasks next_line --include-path FOLDER --mode ar

Writes `next_line.jsonl` and two task files into the folder: `next_line` asks for the line, which
has to match exactly, `next_line_likelihood` for its log-probability. The prompts are those of
`benchmarks.prompts`: the beginnings of functions and classes in files of the running interpreter's
standard library that no training step has read. Each ends with the break and the indentation of
the asked line, which are one token together; an opening that a blank line or the end of its
block follows is left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.prompts import Prompt, held_out_prompts
from twotower.towers.training.corpus import read_corpus, standard_library

# More than there are held-out openings.
ALL = 100_000
MAX_LINE_TOKENS = 64
TASK, LIKELIHOOD_TASK = "next_line", "next_line_likelihood"
_HEAD = """task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{line}}}}"
target_delimiter: ""
"""
_WRITES = f"""output_type: generate_until
generation_kwargs: {{until: ["\\n"], max_gen_toks: {MAX_LINE_TOKENS}, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""
_JUDGES = """output_type: loglikelihood
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
metadata: {version: 1.0}
"""


class Row(NamedTuple):
    """The lines before, up to the asked line's indentation, and the line after that."""

    path: str
    prompt: str
    line: str


def rows_of(prompts: Sequence[Prompt]) -> Iterator[Row]:
    """A row for each prompt that an indented line follows at once."""
    for prompt in prompts:
        lines = prompt.rest.split("\n")
        line = lines[1] if len(lines) > 1 and not lines[0] else ""
        code = line.strip()
        if code and line[0] in " \t":
            indentation = line[: len(line) - len(line.lstrip())]
            yield Row(prompt.path, f"{prompt.text}\n{indentation}", code)


def held_out_rows(count: int = ALL) -> list[Row]:
    """Up to `count` rows from the held-out files of the standard library."""
    return list(rows_of(held_out_prompts(read_corpus(standard_library()), ALL)))[:count]


def write_tasks(folder: Path, rows: Sequence[Row]) -> None:
    """Writes the rows and both task files."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / f"{TASK}.jsonl"
    lines = [json.dumps(row._asdict()) for row in rows]
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    for name, text in ((TASK, _WRITES), (LIKELIHOOD_TASK, _JUDGES)):
        head = _HEAD.format(name=name, data=json.dumps(str(data)))
        (folder / f"{name}.yaml").write_text(head + text, encoding="utf-8")


def main() -> None:
    """Parses the arguments and writes the task."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="gets the data and the task files")
    parser.add_argument("--count", type=int, default=ALL, help="most rows; all if left out")
    args = parser.parse_args()
    rows = held_out_rows(args.count)
    write_tasks(args.folder, rows)
    print(f"{len(rows)} rows in {args.folder}")


if __name__ == "__main__":
    main()
