"""Tiny random towers, the same as those of the tests of bench."""

from __future__ import annotations

from tests.bench.conftest import context_tower, maker  # noqa: F401
