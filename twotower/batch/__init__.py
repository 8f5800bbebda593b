"""Batch jobs: every record of a data set completed, in runs that go on after an interruption."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["BatchDefaults", "JobCounts", "JobOptions", "JobSummary", "run_job"]

if TYPE_CHECKING:
    from twotower.batch.counts import JobCounts, JobSummary
    from twotower.batch.job import run_job
    from twotower.batch.options import JobOptions
    from twotower.batch.requests import BatchDefaults

_HOMES = {
    "BatchDefaults": "twotower.batch.requests",
    "JobCounts": "twotower.batch.counts",
    "JobOptions": "twotower.batch.options",
    "JobSummary": "twotower.batch.counts",
    "run_job": "twotower.batch.job",
}


def __getattr__(name: str) -> object:
    """Loads a public name on first use: a job's workers need none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'twotower.batch' has no attribute {name!r}")
    try:
        home = import_module(_HOMES[name])
    except ModuleNotFoundError as error:
        wanted = f"twotower.batch: needs {error.name}; pip install 'twotower[batch]'"
        raise ModuleNotFoundError(wanted, name=error.name) from error
    return getattr(home, name)
