"""Pointwise functions that give an element the same bits at any index of a tensor.

On a CPU torch's silu, sigmoid, softplus, log1p and rsqrt use a vector routine for the body of a
tensor and a scalar one for its tail, which differ in the last bit; exp, log and sqrt do not.
These forms are built from the latter, so that a row does not depend on the batch around it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    """x * sigmoid(x), computed in fp32, returned in x's dtype."""
    wide = x.float()
    below = torch.neg(wide).exp_().add_(1.0)
    return torch.div(wide, below, out=below).to(x.dtype)


def silu_(x: Tensor) -> Tensor:
    """`silu` of fp32, in place."""
    return x.div_(torch.neg(x).exp_().add_(1.0))


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)) in x's dtype."""
    return 1.0 / (1.0 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)) as fp32; computed in fp64, where the sum keeps the digits of a small exp."""
    wide = x.double()
    return torch.where(wide > 20.0, wide, torch.log(1.0 + torch.exp(wide))).float()


def relu_squared(x: Tensor) -> Tensor:
    """relu(x)^2 in x's dtype, in place: the activation of every MLP and expert."""
    x = x.clamp_min_(0.0)
    return x.mul_(x)
