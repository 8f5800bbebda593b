"""Settings of a tower's engine: every default and every rule of a value."""

from __future__ import annotations

from dataclasses import dataclass

from twotower.towers.engine.pass_memory import unsent_bytes, working_bytes
from twotower.towers.errors import ConfigError
from twotower.towers.model.backbone import Tower
from twotower.towers.state.budget import pool_for
from twotower.towers.state.pool import StatePool

# Prompts are read on a grid of this many tokens whatever shares the pass, so that a prompt's state
# has the same bits after a restart, in another batch and from the prefix cache. Pieces are as long
# as a row that streams beside them may wait: of 64 tokens a CPU gives each expert too few to be
# worth its weights, and a GPU reads a pass's weights in the time in which it computes with 1024.
PREFILL_CHUNK = 256
_PREFILL_CHUNK = {"cpu": PREFILL_CHUNK, "cuda": 1024}
# On CUDA a pass is bound by its weights up to thousands of tokens, on a CPU by its tokens.
_MAX_NUM_BATCHED_TOKENS = {"cpu": 512, "cuda": 4096}
_MAX_PREFILL_TOKENS = {"cpu": PREFILL_CHUNK, "cuda": 1024}
# A GPU's passes have their memory reserved before; on a CPU they and other programs need the rest.
_MEMORY_FRACTION = {"cpu": 0.25, "cuda": 0.95}
# Least values; the documentation of the settings reads them here.
LEAST = {
    "max_num_seqs": 1,
    "max_context": 1,
    "max_num_batched_tokens": 1,
    "max_prefill_tokens": 1,
    "max_rows_per_pass": 1,
    "prefill_chunk": 1,
    "max_queued_requests": 0,
    "prefix_cache_mib": 0,
}


@dataclass(frozen=True)
class PassLimits:
    """Limits of one pass; see `EngineOptions`."""

    max_num_batched_tokens: int
    max_prefill_tokens: int
    max_rows_per_pass: int | None = None


@dataclass(frozen=True)
class EngineOptions:
    """Settings of the engines of a pair. Raises ConfigError for a value out of its range.

    `max_num_seqs` rows of up to `max_context` tokens (None: the model's limit) are held at a time;
    `max_queued_requests` more wait for room (None: any number). States take `memory_fraction` of
    the memory that weights and passes leave, and the prefix cache's snapshots `prefix_cache_mib`
    MiB beside them (0: no cache).

    `max_num_batched_tokens` and `max_rows_per_pass` (None: no limit) hold for a pass without
    prefill, and for a pass of nothing else; prefill that shares a pass with other work has
    `max_prefill_tokens` on top of them. Prompts are read `prefill_chunk` tokens at a time.

    Unless said otherwise, None stands for the default of the tower's kind of device.
    """

    max_num_seqs: int = 64
    max_context: int | None = None
    memory_fraction: float | None = None
    max_num_batched_tokens: int | None = None
    max_prefill_tokens: int | None = None
    max_rows_per_pass: int | None = None
    prefill_chunk: int | None = None
    max_queued_requests: int | None = None
    prefix_cache_mib: int = 64

    def __post_init__(self) -> None:
        for name, least in LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}: got {value}, expected at least {least}")
        if self.memory_fraction is not None and not 0.0 < self.memory_fraction <= 1.0:
            raise ConfigError(
                f"memory_fraction: got {self.memory_fraction}, expected above 0 and at most 1"
            )

    def pass_limits(self, device_type: str) -> PassLimits:
        """Limits of a pass on a kind of device, `cpu` or `cuda`."""
        return PassLimits(
            self.max_num_batched_tokens or _MAX_NUM_BATCHED_TOKENS[device_type],
            self.max_prefill_tokens or _MAX_PREFILL_TOKENS[device_type],
            self.max_rows_per_pass,
        )

    def prefill_chunk_on(self, device_type: str) -> int:
        """Tokens of a prompt that one pass reads on a kind of device."""
        return self.prefill_chunk or _PREFILL_CHUNK[device_type]

    @property
    def prefix_cache_bytes(self) -> int:
        """Bytes of `prefix_cache_mib`."""
        return self.prefix_cache_mib << 20

    def pool_for(self, tower: Tower, *others: Tower, mirrored: bool = False) -> StatePool:
        """Memory for the states of a tower's rows. On a GPU the passes of the tower, and those of
        `others` that read the same states, keep theirs; so do the logs that `mirrored` rows keep
        for mirrors on another device. Raises ConfigError if no row has room."""
        device, dtype = tower.device, tower.dtype
        reserved = sum(self._reserved_bytes(each) for each in (tower, *others))
        if mirrored and device.type == "cuda":
            reserved += unsent_bytes(tower.config, dtype, self.max_num_seqs)
        return pool_for(
            tower.config,
            device,
            dtype,
            max_num_seqs=self.max_num_seqs,
            max_context=self.max_context,
            memory_fraction=self.memory_fraction or _MEMORY_FRACTION[device.type],
            reserved=reserved,
        )

    def _reserved_bytes(self, tower: Tower) -> int:
        """Bytes of a GPU that a tower's passes and prefix cache take beside weights and states."""
        if tower.device.type != "cuda":
            return 0
        limits, reads_prompts = self.pass_limits(tower.device.type), tower.reads_prompts
        tokens = limits.max_num_batched_tokens
        tokens += limits.max_prefill_tokens if reads_prompts else 0
        cache = self.prefix_cache_bytes if reads_prompts else 0
        return cache + working_bytes(
            tower.config, tower.dtype, tokens, self.max_num_seqs, reads_prompts=reads_prompts
        )
