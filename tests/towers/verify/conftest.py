"""Fixtures of the tests of recorded passes."""

from __future__ import annotations

from tests.kernels.conftest import products_of_bf16

__all__ = ["products_of_bf16"]
