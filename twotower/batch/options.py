"""What a batch job is asked to do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from twotower.batch.requests import BatchDefaults
from twotower.batch.sink import Format
from twotower.towers.errors import InvalidRequestError

MOST_IN_FLIGHT = 65_536


@dataclass(frozen=True)
class JobOptions:
    """What a job does. `service` has the settings of a service of its own, for a job without
    `targets`; `concurrency` is the number of requests in flight of each of `callers` processes
    (None: what the service has room for)."""

    inputs: tuple[str, ...]
    output: str
    defaults: BatchDefaults
    targets: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)
    service: Mapping[str, Any] = field(default_factory=dict)
    format: Format | None = None
    concurrency: int | None = None
    callers: tuple[int, int] = (1, 1)
    patience_s: float = 600.0
    rows_per_commit: int | None = None
    ordered: bool = False
    retry_errors: bool = False
    fresh: bool = False

    def __post_init__(self) -> None:
        for name, value in self.defaults.body.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError):
                raise InvalidRequestError(name, value, "a value that JSON has") from None
        if not 0 <= self.defaults.seed < 2**63:
            raise InvalidRequestError("seed", self.defaults.seed, "0 to 2^63 - 1")
        if not 0 < self.patience_s < math.inf:
            raise InvalidRequestError("patience", self.patience_s, "a number above 0")
        for name in ("concurrency", "rows_per_commit"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MOST_IN_FLIGHT:
                raise InvalidRequestError(name, value, f"1 to {MOST_IN_FLIGHT}")
