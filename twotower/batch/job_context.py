"""Ray Data's settings of a batch job."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data import DataContext
from ray.data.checkpoint import CheckpointConfig
from ray.exceptions import RayError, RayTaskError

from twotower.batch.filesystems import open_filesystem
from twotower.batch.journal import JobPlaces
from twotower.batch.lines import CHECKPOINT_COLUMN
from twotower.towers.errors import TwoTowerError, UnavailableError

# A file is read in such pieces, and no further ahead than rows are wanted.
_BLOCK_BYTES = 1 << 20
# What reading a job's checkpoint takes beside the identifiers themselves.
_FILTER_BYTES = 64 << 20


@contextmanager
def job_context(places: JobPlaces) -> Iterator[None]:
    """Ray Data's settings of the job, for as long as the block runs."""
    before = DataContext.get_current()
    context = copy.deepcopy(before)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.verbose_stats_logs = False
    context.target_max_block_size = _BLOCK_BYTES
    filesystem, path = open_filesystem(places.checkpoints)
    checkpoint = CheckpointConfig(
        id_column=CHECKPOINT_COLUMN,
        checkpoint_path=path,
        delete_checkpoint_on_success=False,
        override_filesystem=filesystem,
    )
    checkpoint.checkpoint_actor_memory_bytes = _FILTER_BYTES
    checkpoint.checkpoint_actor_pool_max_size = 1
    context.checkpoint_config = checkpoint
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    DataContext._set_current(context)
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        DataContext._set_current(before)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def in_our_words() -> Iterator[None]:
    """Raises an error of a pipeline as ours if it is one, else as UnavailableError in one line."""
    try:
        yield
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, TwoTowerError):
            raise error.cause from error
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[-1] if lines else repr(error)
        raise UnavailableError(f"the job's pipeline failed: {reason}") from error
