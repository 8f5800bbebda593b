"""The self-test of a device: recorded passes of a tiny model through its own operators.

A kernel that was compiled wrongly, or a device that computes wrongly, writes plausible nonsense. So
before a tower takes rows on a device, the passes that it is going to make are run there with a tiny
model (`formula_model`) and compared with what the references gave on a CPU. Both towers run,
whichever the process has: they share their operators. `python -m tools.self_test` records.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.quantized import ExpertProducts
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import DeviceError
from twotower.towers.verify.formula_model import formula_towers
from twotower.towers.verify.recorded_passes import run_passes
from twotower.towers.verify.report import CaseReport

logger = logging.getLogger(__name__)

RECORDING = Path(str(files("twotower"))) / "towers" / "verify" / "self_test.safetensors"
# What rounding leaves, relative to the size of the numbers. In bf16 the references on a CPU and the
# kernels under their interpreter are off by half of it; in fp32 products may be those of TF32.
LIMITS = {torch.float32: 5e-3, torch.bfloat16: 5e-2}
# Of products whose tokens are rounded to 8 bits as well.
LIMIT_OF_8_BITS = 1e-1
# Of a tensor so many numbers are compared, from all over it.
_SAMPLED = 1024


def prove_device(
    folder: Path,
    device: str | torch.device,
    dtype: torch.dtype,
    wanted: bool | None = None,
    expert_products: ExpertProducts = "widened",
    deterministic: bool = False,
) -> None:
    """The self-test of a device that is to hold a tower of the checkpoint in `folder`, if it is
    `wanted` (None: on CUDA). Raises DeviceError, which is logged as well; ConfigError for the
    checkpoint's config.json, or products that the device does not have; torch's OutOfMemoryError of
    a device that is full."""
    place = torch.device(device)
    if not (place.type == "cuda" if wanted is None else wanted):
        return
    config = TwoTowerConfig.from_file(folder / "config.json")
    if expert_products == "fp8" and not config.quantized_experts:
        # Loading refuses this with the checkpoint's name.
        return
    try:
        seconds = self_test(
            place,
            dtype,
            quantized_experts=config.quantized_experts,
            expert_products=expert_products,
            deterministic=deterministic,
        )
    except DeviceError as error:
        logger.error("%s", error)
        raise
    logger.info("the self-test of device %s passed in %.1f s", place, seconds)


def self_test(
    device: torch.device,
    dtype: torch.dtype,
    *,
    quantized_experts: bool = False,
    for_triton: bool | None = None,
    expert_products: ExpertProducts = "widened",
    deterministic: bool = False,
) -> float:
    """Runs the recorded passes on `device`, in `dtype`, and frees what they took; the seconds that
    this took. Raises DeviceError with the first numbers that are off, and the kernel to blame if
    one alone is wrong."""
    kind = (device, dtype, quantized_experts, for_triton, expert_products, deterministic)
    began = time.monotonic()
    try:
        report = _compared(*kind)
        if report.misses:
            by_kernels = device.type == "cuda" if for_triton is None else for_triton
            wrong = _wrong_kernels(*kind) if by_kernels and _still_works(device) else []
            raise DeviceError(_refusal(device, dtype, report, wrong))
    finally:
        gc.collect()
        if device.type == "cuda" and _still_works(device):
            torch.cuda.empty_cache()
    return time.monotonic() - began


def _still_works(device: torch.device) -> bool:
    """False after an error that no later call of this process gets past, as a kernel that has read
    where it must not."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        logger.warning("device %s is lost to this process: %s", device, error)
        return False
    return True


def _compared(
    device: torch.device,
    dtype: torch.dtype,
    quantized_experts: bool,
    for_triton: bool | None,
    expert_products: ExpertProducts,
    deterministic: bool,
) -> CaseReport:
    """What the recorded passes give on `device`, beside the recording."""
    report = CaseReport(str(device), "self-test")
    limit = LIMITS[dtype] if expert_products == "widened" else LIMIT_OF_8_BITS
    check = _Check(report, load_file(RECORDING), limit)
    kind = (quantized_experts, for_triton, expert_products, deterministic)
    towers = formula_towers(device, dtype, *kind)
    try:
        run_passes(*towers, check)
    except torch.OutOfMemoryError:
        # A device that is full is not a wrong one.
        raise
    except Exception as error:
        # Whatever a kernel that does not work makes of it: the tower must not serve.
        logger.warning("%s failed in the self-test", check.name, exc_info=error)
        report.misses.append(f"{check.name} failed with {type(error).__name__}: {error}")
    return report


def _wrong_kernels(*kind: Any) -> list[str]:
    """Names of the operators with whose reference, in place of its kernel, all checks hold."""
    found = []
    for name, operator in dispatch.OPERATORS.items():
        if operator.has_kernel:
            with dispatch.by_reference(operator):
                if not _compared(*kind).misses:
                    found.append(name)
    return found


def sampled(tensor: Tensor) -> Tensor:
    """Numbers from all over a tensor, fp32, [n]."""
    flat = tensor.detach().reshape(-1)
    # Odd, so that no lane of a kernel is passed over for good.
    return flat[:: max(1, flat.numel() // _SAMPLED) | 1].float().cpu().clone()


class _Check:
    """Compares with the recording; `name` is what is being computed."""

    def __init__(self, report: CaseReport, recorded: Mapping[str, Tensor], limit: float) -> None:
        self.name = "the first pass"
        self._report = report
        self._recorded = recorded
        self._limit = limit

    def near(self, name: str, got: Tensor) -> None:
        self.name = f"what follows {name}"
        self._report.near(name, sampled(got), self._recorded[name], self._limit)

    def same(self, name: str, got: Sequence[int]) -> None:
        self.name = f"what follows {name}"
        self._report.same(name, list(got), self._recorded[name].tolist())


def _refusal(
    device: torch.device, dtype: torch.dtype, report: CaseReport, wrong: Sequence[str]
) -> str:
    kind = str(dtype).removeprefix("torch.")
    blamed = f"; with the reference of {' or '.join(wrong)} in place of its kernel they hold"
    return (
        f"the self-test of device {device} in {kind} failed, so that no tower serves there: "
        f"{len(report.misses)} of {report.checks} checks miss: {report.misses[0]}"
        f"{blamed if wrong else ''}. Compare with another device and with other versions of its "
        "driver, torch and Triton, and report it; self_test: false turns this off"
    )
