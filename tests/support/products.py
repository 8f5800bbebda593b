"""The products of other processors, on this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import get_args

import torch

from twotower.kernels.products import Products, force_products

# The best first.
ALL_PRODUCTS: tuple[Products, ...] = get_args(Products)


@contextmanager
def multiplied_by(products: Products) -> Iterator[None]:
    """Inside, our products and torch's own are those of a processor that has no better ones.

    Torch takes oneDNN by itself for bf16 only, in training and attention. Raises ValueError where
    `products` is not there.
    """
    own = torch._C._get_mkldnn_enabled()
    with force_products(products):
        torch._C._set_mkldnn_enabled(own and products == "onednn")
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(own)
