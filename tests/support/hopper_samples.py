"""Kernels whose machine code is known beforehand, for the tests of tests/support/hopper.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source, target, count, block: tl.constexpr):
    """Moves a block; nothing to spill."""
    places = tl.program_id(0) * block + tl.arange(0, block)
    tl.store(target + places, tl.load(source + places, mask=places < count), mask=places < count)


@triton.jit
def product(a, b, out, rows: tl.constexpr, inner: tl.constexpr, columns: tl.constexpr):
    """out [rows, columns] = a [rows, inner] @ b [inner, columns]."""
    m, n, k = tl.arange(0, rows), tl.arange(0, columns), tl.arange(0, inner)
    left = tl.load(a + m[:, None] * inner + k[None, :])
    right = tl.load(b + k[:, None] * columns + n[None, :])
    tl.store(out + m[:, None] * columns + n[None, :], tl.dot(left, right))


@triton.jit
def hoarder(source, target, rounds, block: tl.constexpr):
    """Holds 3 x `block` numbers over a loop: more than the registers of one warp."""
    places = tl.arange(0, block)
    first = tl.load(source + places)
    second = tl.load(source + block + places)
    third = tl.load(source + 2 * block + places)
    for i in range(0, rounds):
        first = first * second + i
        second = second * third + first
        third = third * first + second
    tl.store(target + places, first + second + third)


@triton.jit
def impossible(out, size: tl.constexpr):
    """A range that is no power of two: no compiler takes it."""
    tl.store(out + tl.arange(0, size), 0)
