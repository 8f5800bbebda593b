"""The parts of a pair of towers, and the resources that each part asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower.kernels.quantized import ExpertProducts
from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.engine.options import EngineOptions

Transport = Literal["grpc", "gloo", "nccl"]
GroupFault = Literal["corrupt", "hang", "absent"]
Placement = Literal["separate", "colocated", "ar_only"]
REPLICA_BUNDLE, CONTEXT_BUNDLE, DENOISER_BUNDLE = range(3)
# The replica only passes messages on; its share keeps Ray from packing too many on a core.
REPLICA_CPUS = 0.1
# A pair without a limit of queued rows still has that of the router.
MOST_QUEUED = 4096
_WIDEST_DTYPE_BYTES = 4
# max_context counts tokens, a row's capacity whole blocks.
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkFaults:
    """Faults put into a link on purpose: `delay_s` before each update's end is sent; the link
    breaks once, at the end of update number `cut_at` (None: never). A process group flips a bit of
    what it carries ("corrupt"), carries nothing ("hang"), or does not form ("absent")."""

    delay_s: float = 0.0
    cut_at: int | None = None
    group: GroupFault | None = None


@dataclass(frozen=True)
class PairTopology:
    """A pair: where its towers come from, where they run, and what they may take.

    Both towers load `model_path` as `dtype` on `device`, and their engines have the options
    `engine`; routed experts in 8 bits are multiplied as `expert_products` says. With
    `deterministic` a row has the same bits in any batch on a GPU too. Each tower reserves
    `cpus_per_tower` and `gpus_per_tower`, which may be fractions, and computes with `num_threads`
    threads (None: half of the CPUs that its process may use). `transport` carries states from tower
    to tower; NCCL needs a GPU for each. With `channel_tls` they are encrypted on the way.

    `placement` "separate" gives the context tower and each of `denoisers_per_context` denoiser
    towers a process of its own, "colocated" holds both towers in one process and one copy of every
    state, "ar_only" has no denoiser. A pass that runs for longer than `stall_timeout_s` counts as
    hung; a denoiser tower that is lost has `repair_timeout_s` to be back. `faults` disturb the
    first link to each denoiser tower, on purpose. With `self_test` (None: on CUDA) a device is
    tested before it holds a tower.
    """

    model_path: str
    device: str
    dtype: str
    engine: EngineOptions
    cpus_per_tower: float
    gpus_per_tower: float
    num_threads: int | None = None
    transport: Transport = "grpc"
    placement: Placement = "separate"
    denoisers_per_context: int = 1
    stall_timeout_s: float = 60.0
    repair_timeout_s: float = 120.0
    faults: LinkFaults | None = None
    channel_tls: bool = False
    deterministic: bool = False
    expert_products: ExpertProducts = "widened"
    self_test: bool | None = None

    def __post_init__(self) -> None:
        denoisers, gpus, on_cuda = self.denoisers_per_context, self.gpus_per_tower, self.on_cuda
        if denoisers > 1 and self.placement != "separate":
            raise ValueError(
                f"denoisers_per_context: got {denoisers}, expected 1 with "
                f"placement {self.placement!r}"
            )
        if self.transport == "nccl" and not on_cuda:
            raise ValueError(f"transport: got 'nccl' for device {self.device!r}, expected CUDA")
        if self.channel_tls and self.transport != "grpc":
            raise ValueError(
                f"channel_tls: got true with transport {self.transport!r}, which does not encrypt "
                "the bytes of states, expected transport 'grpc'"
            )
        if on_cuda and not gpus:
            raise ValueError(
                f"gpus_per_tower: got 0 for device {self.device!r}, expected a share of a GPU"
            )
        if self.transport == "nccl" and gpus < 1:
            # Shares of a GPU may be packed on one, and there NCCL refuses to join two processes.
            raise ValueError(
                f"gpus_per_tower: got {gpus:g} for 'nccl', expected a whole GPU per tower"
            )

    @property
    def on_cuda(self) -> bool:
        """True if the towers run on CUDA devices."""
        return self.device.startswith("cuda")

    @property
    def actors(self) -> int:
        """Number of processes that hold towers."""
        return 1 + self.denoisers_per_context if self.placement == "separate" else 1

    def bundles(self) -> list[dict[str, float]]:
        """Resources of the placement group: the replica, the context tower, each denoiser tower;
        colocated towers share one."""
        tower = {"CPU": self.cpus_per_tower} if self.cpus_per_tower else {}
        if self.gpus_per_tower:
            tower["GPU"] = self.gpus_per_tower
        return [{"CPU": REPLICA_CPUS}, *(dict(tower) for _ in range(self.actors))]

    def max_concurrency(self) -> int:
        """Calls that a tower's actor takes at once: two per row, one per row that waits, and those
        that watch it."""
        queued = self.engine.max_queued_requests
        queued = MOST_QUEUED if queued is None else queued
        return 2 * self.engine.max_num_seqs + queued + 64


def max_update_bytes(config: TwoTowerConfig, max_context: int | None) -> int:
    """Most bytes that one row's state update may have, whatever its dtype, for rows of up to
    `max_context` tokens (None: the model's limit)."""
    tokens = config.max_position_embeddings if max_context is None else max_context
    mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
    conv = (config.conv_kernel - 1) * config.conv_dim
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    kv = 2 * config.num_key_value_heads * config.head_dim * tokens
    values = mamba * (conv + ssm) + attention * kv
    return values * _WIDEST_DTYPE_BYTES + _SLACK_BYTES
