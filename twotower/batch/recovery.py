"""Undoing rows of a job that is not running."""

from __future__ import annotations


def retry_rows(folder: str, checkpoints: str) -> int:
    """Makes the rows that ended as errors undone, so that the next run does them; their number.

    A crash in between loses nothing and doubles nothing; calling it again finishes it.
    """
    raise NotImplementedError


def repair_parts(folder: str, checkpoints: str) -> int:
    """Undoes the parts of which a crash left both a committed and a pending checkpoint; how many.

    To be called before each run: Ray Data would delete the data of such a part and keep its rows
    as done.
    """
    raise NotImplementedError
