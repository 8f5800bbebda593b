"""GPUs by name: figures of their datasheets, and measured ceilings where there are any."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.planner.floors import Ceilings
from twotower.towers.errors import ConfigError

# Shares of the datasheet's figures that a copy, a large product and fp32 work are taken to reach on
# GPUs without measurements: an H200 copies at 4.3 of 4.8 TB/s, multiplies at 790 of 989 TFLOP/s.
COPY_REACH, PRODUCT_REACH, WIDE_REACH = 0.9, 0.8, 0.9
_MIB = 1 << 20
# Nine passes of an H200 with 8-bit experts (denoiser, extension and `ar` step of 1, 16 and 64 rows,
# reports in benchmarks/results/h200-2026-11-27) took 0.92 to 1.15 of their time in bf16. So experts
# reach 0.40 to 0.56 of what they reach in bf16, about half.
HOPPER_FP8 = 0.5
_FP8_MEASURED = "passes of an H200 of 2026-11-27 took 0.92 to 1.15 of their time in bf16"


@dataclass(frozen=True)
class Device:
    """A kind of GPU: memory in bytes as the driver reports it, bytes/s and dense FLOP/s (bf16,
    fp32) of the datasheet, and measured ceilings if there are any.

    `fp8_reach`: products of experts in 8 bits reach this share of what bf16 ones reach of their
    floor, where that was measured; 0.5 means that they take as long as in bf16.
    """

    name: str
    title: str
    memory_bytes: int
    bandwidth: float
    bf16_flops: float
    fp32_flops: float
    source: str
    measured: Ceilings | None = None
    measured_source: str = ""
    fp8_reach: float | None = None
    fp8_source: str = ""

    def ceilings(self) -> Ceilings:
        """Measured ceilings, otherwise the usual shares of the datasheet's figures."""
        return self.measured or Ceilings(
            COPY_REACH * self.bandwidth,
            PRODUCT_REACH * self.bf16_flops,
            WIDE_REACH * self.fp32_flops,
        )

    def ceilings_source(self) -> str:
        """The source of the ceilings, as text of a plan."""
        if self.measured is not None:
            return self.measured_source
        shares = f"{COPY_REACH:g} of its bandwidth, {PRODUCT_REACH:g} of its bf16 rate"
        return f"{shares}, as an H200 reaches; {self.source}"


_ALL = (
    Device(
        "a100-80",
        "A100",
        81920 * _MIB,
        2.039e12,
        312e12,
        19.5e12,
        "NVIDIA A100 80GB SXM datasheet; memory as nvidia-smi shows it",
    ),
    Device(
        "h100",
        "H100",
        81559 * _MIB,
        3.35e12,
        989e12,
        67e12,
        "NVIDIA H100 SXM datasheet; memory as nvidia-smi shows it",
        fp8_reach=HOPPER_FP8,
        fp8_source=f"as on an H200, the same chip: {_FP8_MEASURED}",
    ),
    Device(
        "h200",
        "H200",
        143771 * _MIB,
        4.8e12,
        989e12,
        67e12,
        "NVIDIA H200 SXM datasheet; memory as nvidia-smi shows it",
        Ceilings(4.3e12, 790e12, 60e12),
        "copy 4.3 TB/s and products of 790 TFLOP/s on an H200",
        HOPPER_FP8,
        _FP8_MEASURED,
    ),
    Device(
        "b200",
        "B200",
        180_000_000_000,
        8.0e12,
        2250e12,
        75e12,
        "NVIDIA DGX B200 datasheet (1,440 GB, 64 TB/s and 36 PFLOP/s sparse bf16 over 8 GPUs)",
    ),
    Device(
        "l40s",
        "L40S",
        46068 * _MIB,
        0.864e12,
        362e12,
        91.6e12,
        "NVIDIA L40S datasheet; memory as nvidia-smi shows it",
    ),
    Device(
        "gb10",
        "GB10",
        128_000_000_000,
        0.273e12,
        125e12,
        31e12,
        "NVIDIA DGX Spark datasheet; bf16 is an eighth of its 1 PFLOP/s of sparse FP4; its memory "
        "is the host's as well",
    ),
)
DEVICES = {device.name: device for device in _ALL}


def device_named(name: str) -> Device:
    """The GPU of that name. Raises ConfigError if it is not in the table."""
    if name not in DEVICES:
        raise ConfigError(f"gpu: got {name!r}, expected one of {', '.join(DEVICES)}")
    return DEVICES[name]
