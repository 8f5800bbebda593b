"""Whether kernels are chosen so that a row's bits depend on nothing else in its pass.

Inside `deterministic()` an operator on a GPU has one launch shape for all passes of a weight, a
dtype and a device:

    linear, mlp   our own product, one tile and one split per weight; never a library's, which takes
                  another kernel for another number of rows
    experts       one tiling for every number of tokens, the shared MLP by our own product too
    mamba_scan    the kernel over chunks with one tile, for single tokens, blocks and prompts alike;
                  never a foreign scan, which runs only for a prompt that is alone
    attention     one tiling; splits by a row's own context, however many rows there are
    route         one tile of tokens; without narrow parts the reference, in fp64 tiles of 16 tokens

The others are a program per token, per line of logits or per row in any case: norms, replay, K/V
that are stored, draws, commits, and the sum of an expert's results, in the order of its slots.
On a CPU the references are exact in any batch, inside and outside.
Source of the rule: He et al. 2025, "Defeating Nondeterminism in LLM Inference".
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_wanted: ContextVar[bool] = ContextVar("twotower_deterministic", default=False)


def is_deterministic() -> bool:
    """True inside `deterministic`."""
    return _wanted.get()


@contextmanager
def deterministic() -> Iterator[None]:
    """Inside, a row has the bits that it has alone. A graph keeps what was chosen while it was
    captured."""
    token = _wanted.set(True)
    try:
        yield
    finally:
        _wanted.reset(token)
