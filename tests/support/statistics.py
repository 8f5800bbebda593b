"""p-values of drawn numbers.

scipy is imported where it is needed: its import takes a second, which every process that collects
the tests would spend.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def chi_square(tokens: list[int], expected: Tensor) -> float:
    """p-value of the counts of token ids against probabilities [V]; tokens that are expected less
    than 5 times are put together. AssertionError for a token of probability 0."""
    from scipy import stats  # type: ignore[import-untyped]

    counts = torch.bincount(torch.tensor(tokens), minlength=len(expected)).double()
    wanted = expected.double() * len(tokens)
    assert float(counts[wanted == 0].sum()) == 0
    rare = (wanted < 5) & (wanted > 0)
    common = wanted >= 5
    got = [*counts[common].tolist(), float(counts[rare].sum())]
    want = [*wanted[common].tolist(), float(wanted[rare].sum())]
    kept = np.array(want) > 0
    return float(stats.chisquare(np.array(got)[kept], np.array(want)[kept]).pvalue)


def uniformity(drawn: Tensor) -> float:
    """p-value of numbers in [0, 1) against the uniform distribution (Kolmogorov-Smirnov)."""
    from scipy import stats

    return float(stats.kstest(drawn.flatten().numpy(), "uniform").pvalue)
