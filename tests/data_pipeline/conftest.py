"""What tests of pipelines share: Ray's own imports, which warn."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    # Models of Ray Serve and of ray.data.llm use spellings that pydantic has deprecated.
    warnings.simplefilter("ignore")
    import ray.data.llm
    import ray.serve  # noqa: F401
