"""Ray, imported before a test looks for warnings."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    import ray.serve  # noqa: F401
