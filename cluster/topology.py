"""What a pair of towers is made of and which resources each part asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.towers.config import ATTENTION, MAMBA, TwoTowerConfig

REPLICA_BUNDLE, CONTEXT_BUNDLE, DENOISER_BUNDLE = range(3)
# The replica only passes messages on; its share keeps Ray from packing too many on a core.
REPLICA_CPUS = 0.1
_WIDEST_DTYPE_BYTES = 4
# max_context counts tokens, a row's capacity whole blocks.
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class PairTopology:
    """One pair: where its towers come from, where they run, and what they may take.

    `cpus` and `gpus` are per tower and may be fractions; `num_threads` is the number of threads
    of a tower's arithmetic, `max_rows` and `max_context` bound what a tower holds.
    """

    model_path: str
    device: str
    dtype: str
    cpus: float
    gpus: float
    num_threads: int
    max_rows: int
    max_context: int

    def __post_init__(self) -> None:
        for name in ("num_threads", "max_rows", "max_context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus, gpus: got {self.cpus}, {self.gpus}, expected at least 0")
        if self.device.startswith("cuda") and not self.gpus:
            raise ValueError(f"gpus: got 0 for device {self.device!r}, expected a share of a GPU")

    def bundles(self) -> list[dict[str, float]]:
        """Resources of the placement group: the replica, the context tower, the denoiser tower."""
        tower = {"CPU": self.cpus} if self.cpus else {}
        if self.gpus:
            tower["GPU"] = self.gpus
        return [{"CPU": REPLICA_CPUS}, dict(tower), dict(tower)]

    def max_concurrency(self) -> int:
        """Calls that a tower's actor takes at once: two per row, and those that watch it."""
        return 2 * self.max_rows + 64


def max_update_bytes(config: TwoTowerConfig, max_context: int) -> int:
    """Most bytes that one row's state update may have, whatever its dtype."""
    mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
    conv = (config.conv_kernel - 1) * config.conv_dim
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    kv = 2 * config.num_key_value_heads * config.head_dim * max_context
    values = mamba * (conv + ssm) + attention * kv
    return values * _WIDEST_DTYPE_BYTES + _SLACK_BYTES
