"""What a pair of towers is made of and which resources each part asks Ray for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.engine.options import EngineOptions

Transport = Literal["grpc", "gloo", "nccl"]
Placement = Literal["separate", "colocated", "ar_only"]
REPLICA_BUNDLE, CONTEXT_BUNDLE, DENOISER_BUNDLE = range(3)
# The replica only passes messages on; its share keeps Ray from packing too many on a core.
REPLICA_CPUS = 0.1
# Without a queue limit of its own a pair still has the router's.
MOST_WAITING = 4096
_WIDEST_DTYPE_BYTES = 4
# max_context counts tokens, a row's capacity whole blocks.
_SLACK_BYTES = 1 << 20


@dataclass(frozen=True)
class LinkFaults:
    """Faults put into a link on purpose: `delay_s` before each update's end is sent; the link
    breaks once, at the end of update number `cut_at` (None: never)."""

    delay_s: float = 0.0
    cut_at: int | None = None


@dataclass(frozen=True)
class PairTopology:
    """One pair: where its towers come from, where they run, and what they may take.

    `cpus` and `gpus` are per tower and may be fractions; `num_threads` is the number of threads
    of a tower's arithmetic (None: half of the CPUs that its process may use), `max_rows` and
    `max_context` bound what a tower holds. `transport` is what carries the bytes of states from
    tower to tower; NCCL needs a GPU for each. `max_waiting` rows wait for room (None: any number);
    `memory_fraction` of the free memory is for states, `prefix_cache_mib` for the prefix cache's
    snapshots beside them. `prefill_chunk` (None: by device) is the grid on which prompts are read.

    `placement` "separate" gives the context tower and each of `denoisers` denoiser towers a process
    of its own, "colocated" holds both towers in one process and one copy of every state, "ar_only"
    has no denoiser. A pass that runs for longer than `stall_timeout_s` counts as hung; a denoiser
    tower that is lost has `repair_timeout_s` to be back. `faults` disturb the first link to each
    denoiser tower, on purpose.
    """

    model_path: str
    device: str
    dtype: str
    cpus: float
    gpus: float
    num_threads: int | None
    max_rows: int
    max_context: int
    transport: Transport = "grpc"
    max_waiting: int | None = None
    memory_fraction: float | None = None
    max_pass_tokens: int | None = None
    max_prefill_tokens: int | None = None
    prefix_cache_mib: int = 0
    prefill_chunk: int | None = None
    placement: Placement = "separate"
    denoisers: int = 1
    stall_timeout_s: float = 60.0
    repair_timeout_s: float = 120.0
    faults: LinkFaults | None = None

    def __post_init__(self) -> None:
        for name in ("num_threads", "max_rows", "max_context", "denoisers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if self.placement not in get_args(Placement):
            raise ValueError(
                f"placement: got {self.placement!r}, expected one of {get_args(Placement)}"
            )
        if self.denoisers > 1 and self.placement != "separate":
            raise ValueError(
                f"denoisers: got {self.denoisers} with placement {self.placement!r}, expected 1"
            )
        if self.cpus < 0 or self.gpus < 0:
            raise ValueError(f"cpus, gpus: got {self.cpus}, {self.gpus}, expected at least 0")
        if self.transport not in get_args(Transport):
            raise ValueError(
                f"transport: got {self.transport!r}, expected one of {get_args(Transport)}"
            )
        if self.transport == "nccl" and not self.device.startswith("cuda"):
            raise ValueError(f"transport: got 'nccl' for device {self.device!r}, expected CUDA")
        if self.device.startswith("cuda") and not self.gpus:
            raise ValueError(f"gpus: got 0 for device {self.device!r}, expected a share of a GPU")
        if self.transport == "nccl" and self.gpus < 1:
            # Shares of a GPU may be packed on one, and there NCCL refuses to join two processes.
            raise ValueError(f"gpus: got {self.gpus:g} for 'nccl', expected a whole GPU per tower")

    @property
    def actors(self) -> int:
        """Processes that hold towers."""
        return 1 + self.denoisers if self.placement == "separate" else 1

    def bundles(self) -> list[dict[str, float]]:
        """Resources of the placement group: the replica, the context tower, each denoiser tower;
        colocated towers share one."""
        tower = {"CPU": self.cpus} if self.cpus else {}
        if self.gpus:
            tower["GPU"] = self.gpus
        return [{"CPU": REPLICA_CPUS}, *(dict(tower) for _ in range(self.actors))]

    def engine_options(self) -> EngineOptions:
        """What both towers' engines are made with."""
        return EngineOptions(
            max_num_seqs=self.max_rows,
            max_context=self.max_context,
            memory_fraction=self.memory_fraction,
            max_num_batched_tokens=self.max_pass_tokens,
            max_prefill_tokens=self.max_prefill_tokens,
            prefill_chunk=self.prefill_chunk,
            max_queued_requests=self.max_waiting,
            prefix_cache_mib=self.prefix_cache_mib,
        )

    def max_concurrency(self) -> int:
        """Calls that a tower's actor takes at once: two per row, one per row that waits, and those
        that watch it."""
        waiting = MOST_WAITING if self.max_waiting is None else self.max_waiting
        return 2 * self.max_rows + waiting + 64


def max_update_bytes(config: TwoTowerConfig, max_context: int) -> int:
    """Most bytes that one row's state update may have, whatever its dtype."""
    mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
    conv = (config.conv_kernel - 1) * config.conv_dim
    ssm = config.mamba_num_heads * config.mamba_head_dim * config.ssm_state_size
    kv = 2 * config.num_key_value_heads * config.head_dim * max_context
    values = mamba * (conv + ssm) + attention * kv
    return values * _WIDEST_DTYPE_BYTES + _SLACK_BYTES
