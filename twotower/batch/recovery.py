"""Undoing rows of a job that is not running, so that its next run does them.

Checkpoints decide which rows are done, so a checkpoint is changed first, at once, and then the
files of its part are tidied up. A crash before that change has changed nothing; after it the rows
are undone, and their old lines are ignored by `join_parts` and deleted by the next call.
"""

from __future__ import annotations

import numpy

from twotower.batch.part_chunks import CommittedPart
from twotower.batch.parts import PartFolder, repeated_rows
from twotower.batch.sink import ERRORS_SUFFIX


def retry_rows(folder: str, checkpoints: str) -> int:
    """Makes the rows that ended as errors undone, so that the next run does them; their number.

    For each part with errors, in this order: a checkpoint without these rows takes the place of
    the old one (or, if all its rows were errors, the checkpoint is deleted); the file of errors is
    deleted. A crash in between loses nothing and doubles nothing; calling it again finishes it.
    """
    parts = PartFolder(folder, checkpoints)
    committed = set(parts.committed())
    undone = 0
    for name, part in sorted(parts.files().items()):
        if not name.endswith(ERRORS_SUFFIX) or part not in committed:
            continue
        rows = parts.rows(part)
        failed = CommittedPart(parts, part, rows, has_errors=True).error_rows()
        kept = numpy.setdiff1d(rows, failed, assume_unique=True)
        if not kept.size:
            parts.undo(part)
        elif kept.size < rows.size:
            parts.keep_rows(part, kept)
        parts.delete_file(name)
        undone += rows.size - kept.size
    return undone


def repair_parts(folder: str, checkpoints: str) -> int:
    """Undoes what a crash has left contradictory; the number of parts that are undone.

    To be called before each run. Undone are parts that are both committed and pending (a second
    attempt of a task, or a copy in place of a rename): Ray Data would delete their files and keep
    their rows as done. So are committed parts that have no file, and those with a row that another
    part has. Files of parts that are neither are deleted.
    """
    parts = PartFolder(folder, checkpoints)
    committed, pending, files = set(parts.committed()), set(parts.pending()), parts.files()
    contradictory = committed & pending | committed - set(files.values())
    contradictory |= _repeated(parts, committed - contradictory)
    for part in contradictory:
        parts.undo(part)
    for name, part in files.items():
        if part not in committed and part not in pending:
            parts.delete_file(name)
        elif name.endswith(ERRORS_SUFFIX) and part in committed - contradictory:
            # What a crash in `retry_rows` has left: rows that are undone, or done elsewhere.
            own = CommittedPart(parts, part, parts.rows(part), has_errors=True)
            if not own.error_rows().size:
                parts.delete_file(name)
    return len(contradictory)


def _repeated(parts: PartFolder, committed: set[str]) -> set[str]:
    """Parts with a row that an earlier one has, as two runs at a time would leave them."""
    rows = {part: parts.rows(part) for part in sorted(committed)}
    # All other rows cannot make a difference, and there may be millions of them.
    twice = repeated_rows(list(rows.values()))
    repeated: set[str] = set()
    seen: set[int] = set()
    for part, own in rows.items():
        shared = set(numpy.intersect1d(own, twice).tolist()) if twice.size else set()
        if shared & seen:
            repeated.add(part)
        else:
            seen |= shared
    return repeated
