"""Completions as a step of a Ray Data pipeline: reads prompts, completes them, writes what is good.

`twotower serve` in one terminal, `python examples/ray_data_pipeline.py 127.0.0.1:8000` in another
(the HTTP port). Needs the extra `batch`. Each row has a seed of its own, made of its name, so the
texts are the same however rows are spread over actors, and however often the program is run.
"""

import json
import sys
import tempfile

import ray

from twotower.data import completions

ROWS = [{"name": f"read_{what}", "lines": 3} for what in ("path", "json", "csv", "url")]
ROWS.append({"name": "", "lines": 0})


def prompt_of(row: dict[str, object]) -> str | None:
    """The text that is to be completed; a row without a name has none."""
    return f"def {row['name']}(source):\n" if row["name"] else None


rows = ray.data.from_items(ROWS)
completed = completions(
    rows,
    target=sys.argv[1],
    prompt=prompt_of,
    params={"max_tokens": 24, "temperature": 0.8, "mode": "mask_diffusion"},
    id_column="name",
    include=["finish_reason", "completion_tokens", "nfe"],
    concurrency=4,
    callers=1,
    # Without it the row without a prompt would end the pipeline.
    on_error="column",
).materialize()

for row in completed.filter(lambda row: row["error"] is not None).iter_rows():
    print(f"{row['name']!r}: {json.loads(row['error'])['message']}")

good = completed.filter(lambda row: row["error"] is None).drop_columns(["error"])
with tempfile.TemporaryDirectory() as folder:
    good.write_parquet(folder)
    for row in ray.data.read_parquet(folder).sort("name").iter_rows():
        cost = f"{row['completion_tokens']} tokens, {row['nfe']} denoiser passes"
        print(f"{row['name']}: {cost}: {row['text']!r}")
