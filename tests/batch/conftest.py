"""Ray, with its warnings of its own deprecated settings."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
    from ray.data import DataContext

    # Made once for the process.
    DataContext.get_current()
