"""Batch jobs: every record of a data set completed, in runs that go on after an interruption."""

from twotower.batch.job import JobCounts, JobOptions, JobSummary, run_job
from twotower.batch.requests import BatchDefaults

__all__ = ["BatchDefaults", "JobCounts", "JobOptions", "JobSummary", "run_job"]
