# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Programmatic dependent launch: a kernel is on its way before the one ahead of it has ended.

A pass is hundreds of launches that need one another's results, and on Hopper a graph spends about a
microsecond between two of them. Launched so, a kernel is set up while the last one runs, and waits
itself until all of that one's writes can be seen. Every kernel that is launched so begins with
`wait`, before it reads, writes or returns: what is launched after it relies on this. Off unless a
card's launch table has it on, as `"overlap": [{"programmatic": true}]`.
Source: CUDA C++ Programming Guide, programmatic dependent launch and synchronization.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from twotower.kernels.launch_table import tuned


@dataclass(frozen=True)
class Overlap:
    """Whether kernels are launched before the last one has ended."""

    programmatic: bool = False


OVERLAP = Overlap()


def overlap(device: torch.device) -> dict[str, bool]:
    """Arguments of a launch on a device: of the kernel, `waits`, and of Triton."""
    if tuned("overlap", 0, OVERLAP, device).programmatic:
        return {"waits": True, "launch_pdl": True}
    return {"waits": False}


@triton.jit
def wait(waits: tl.constexpr):
    """The first statement of a kernel: lets the next one be set up, and waits for the last."""
    if waits:
        gdc_launch_dependents()
        gdc_wait()
