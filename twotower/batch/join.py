"""One output file of the committed parts of a job."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.batch.sink import Format


@dataclass(frozen=True)
class JoinSummary:
    """Rows of the output and of the file of errors beside it, and the path of that, if any."""

    rows: int
    errors: int
    errors_path: str | None


def join_parts(
    folder: str, checkpoints: str, output: str, *, ordered: bool = False, format: Format = "jsonl"
) -> JoinSummary:
    """Joins the parts in `folder` that `checkpoints` (the folder of Ray Data's) name as committed.

    `output` and, if rows ended as errors, the file beside it (`out.jsonl`: `out.errors.jsonl`) are
    replaced as a whole when they are complete. `ordered` puts rows in the order of the input. Any
    path may be a URL. Memory: 8 bytes a row and a few pages for each part.

    Raises InvalidRequestError if a row is in two parts, or a part lacks rows of its checkpoint.
    """
    raise NotImplementedError


def errors_path(output: str) -> str:
    """The path of the file of errors beside an output file."""
    raise NotImplementedError
