"""Source and sink in a pipeline with Ray Data's checkpoints, ended between write and commit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import ray
from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig

from tests.support.batch_rows import FixedAnswer
from twotower.batch.answers import error_row, output_row, output_table
from twotower.batch.inputs import find_inputs
from twotower.batch.join import join_parts
from twotower.batch.recovery import repair_parts, retry_rows
from twotower.batch.requests import BatchDefaults, RowError, parse_request
from twotower.batch.scan import scan
from twotower.batch.sink import PartSink
from twotower.batch.source import InputSource

pytestmark = pytest.mark.cluster

ROWS = 40
LOST = 17
# One of each block.
REFUSED = range(3, ROWS, 5)
WAIT_S = 120.0


class LosingSink(PartSink):
    """A sink whose process is lost when it has written row LOST and not committed it, and other
    parts are committed."""

    def write(self, blocks: Iterable[Any], ctx: Any) -> None:
        tables = list(blocks)
        super().write(tables, ctx)
        if any(LOST in table["row"].to_pylist() for table in tables):
            wait_for_commits(Path(self.path) / "_job" / "checkpoints", 3)
            raise RuntimeError("lost between write and commit")


def wait_for_commits(checkpoints: Path, least: int) -> None:
    deadline = time.monotonic() + WAIT_S
    while len(list(checkpoints.glob("part-*[0-9].parquet"))) < least:
        assert time.monotonic() < deadline, "the other parts were not committed"
        time.sleep(0.05)


def answered(batch: pyarrow.Table, refused: Sequence[int]) -> pyarrow.Table:
    """What a service would make of rows, of which it refuses some."""
    return output_table([outcome(row, refused) for row in batch.to_pylist()])


def outcome(row: dict[str, Any], refused: Sequence[int]) -> dict[str, Any]:
    number = row["row"]
    try:
        request = parse_request(number, row["line"], BatchDefaults())
    except RowError as error:
        return error_row(number, None, error)
    if number in refused:
        return output_row(number, request, FixedAnswer(status=503, error={"message": "busy"}))
    return output_row(number, request, FixedAnswer(f"text of {request.body['prompt']}"))


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 << 20,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    yield
    ray.shutdown()


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Path]:
    """The job's folder, with checkpoints in it as those of a job whose output is a folder."""
    context = DataContext.get_current()
    checkpoints = tmp_path / "out" / "_job" / "checkpoints"
    checkpoints.mkdir(parents=True)
    kept = context.copy()
    context.enable_progress_bars = False
    # Every block of the source is one of its own.
    context.target_max_block_size = 64
    context.checkpoint_config = CheckpointConfig(
        id_column="row", checkpoint_path=str(checkpoints), delete_checkpoint_on_success=False
    )
    context.checkpoint_config.checkpoint_actor_memory_bytes = 64 << 20
    context.checkpoint_config.checkpoint_actor_pool_max_size = 1
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    yield tmp_path
    DataContext._set_current(kept)


def run(root: Path, sink: Callable[..., PartSink], refused: Sequence[int]) -> None:
    files = find_inputs([str(root / "in.jsonl")])
    source = InputSource(files, rows_per_block=5, duplicates=scan(files).duplicates)
    rows = ray.data.read_datasource(source).map_batches(
        answered, batch_size=5, batch_format="pyarrow", fn_kwargs={"refused": refused}
    )
    rows.write_datasink(sink(str(root / "out"), names=["in.jsonl"]))


def joined(root: Path) -> tuple[list[str], list[str]]:
    """custom_ids of good rows, and codes of errors."""
    parts, output = root / "out", root / "all.jsonl"
    summary = join_parts(str(parts), str(parts / "_job" / "checkpoints"), str(output), ordered=True)
    errors = Path(summary.errors_path).read_text() if summary.errors_path else ""
    return (
        [json.loads(line)["custom_id"] for line in output.read_text().splitlines()],
        [json.loads(line)["error"]["code"] for line in errors.splitlines()],
    )


@pytest.mark.usefixtures("local_ray")
def test_rows_are_there_once_after_an_interruption_and_a_retry(settings: Path) -> None:
    records = [{"prompt": f"p{row}", "id": f"c{row}"} for row in range(ROWS)]
    lines = [*map(json.dumps, records), "{bad", json.dumps(records[0])]
    (settings / "in.jsonl").write_text("\n".join(lines))
    out, checkpoints = settings / "out", settings / "out" / "_job" / "checkpoints"

    with pytest.raises(Exception, match="lost between write and commit"):
        run(settings, LosingSink, REFUSED)
    lost = next(
        path.name.removesuffix(".jsonl")
        for path in out.glob("part-*.jsonl")
        if f'"c{LOST}"' in path.read_text()
    )
    assert (checkpoints / f"{lost}.pending.parquet").exists()
    # Nothing is wrong with what is there; rows that the service refused are to be done again.
    assert repair_parts(str(out), str(checkpoints)) == 0
    before = joined(settings)
    assert "503" in before[1]
    assert f"c{LOST}" not in before[0]
    assert retry_rows(str(out), str(checkpoints)) == len(before[1])
    kept = {path.name: path.read_bytes() for path in out.glob("part-*") if lost not in path.name}
    assert len(kept) >= 3

    run(settings, PartSink, ())
    assert joined(settings) == (
        [f"c{row}" for row in range(ROWS)],
        ["bad_json", "duplicate_custom_id"],
    )
    # What the first run had committed was not written anew, and what it had not is gone.
    after = {path.name: path.read_bytes() for path in out.glob("part-*")}
    assert kept.items() <= after.items()
    assert not [name for name in after if lost in name]
