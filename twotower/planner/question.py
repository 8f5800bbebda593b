"""The question of a plan: GPU, load and commit rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from twotower.planner import commits
from twotower.planner.devices import device_named
from twotower.planner.drafts import CYCLE_TOKENS, LOOKUP_TOKENS
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

Experts = Literal["full", "fp8"]
_FORMATS: dict[str, tuple[Experts, ...]] = {
    "both": ("full", "fp8"),
    "full": ("full",),
    "fp8": ("fp8",),
}


def formats_named(name: str) -> tuple[Experts, ...]:
    """Formats of routed experts: `full`, `fp8` or `both`. Raises ConfigError for another name."""
    if name not in _FORMATS:
        raise ConfigError(f"experts: got {name!r}, expected one of {', '.join(_FORMATS)}")
    return _FORMATS[name]


def model_config(model: str | None) -> TwoTowerConfig:
    """The config of a checkpoint, of the released 30B model for None. Raises CheckpointError."""
    if model is None:
        return LARGE
    return TwoTowerConfig.from_file(resolve_checkpoint(model) / "config.json")


@dataclass(frozen=True)
class Question:
    """A load: `batch` rows at a time of `context` tokens each (prompt and output together) on every
    denoiser, and on every GPU of AR.

    Tokens per denoiser pass are those of `text` at threshold `gamma`, unless `tokens_per_nfe` is
    given. A round of lookups yields `lookup_tokens` in the mean of all rounds, with drafts of one
    token less than a block; a draft of the denoiser and its check yield `cycle_tokens`. With
    `output_tokens` the rest of the context is a prompt that has to be read; without it only
    decoding counts. Raises ConfigError for values out of range.
    """

    gpu: str = "h100"
    context: int = 4096
    batch: int = 64
    gamma: float = 0.8
    text: str = "plain"
    tokens_per_nfe: float | None = None
    output_tokens: int | None = None
    experts: tuple[Experts, ...] = ("full", "fp8")
    most_denoisers: int = 7
    lookup_tokens: float = LOOKUP_TOKENS
    cycle_tokens: float = CYCLE_TOKENS

    def __post_init__(self) -> None:
        device_named(self.gpu)
        for name, least in (("context", BLOCK), ("batch", 1), ("most_denoisers", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("lookup_tokens", "cycle_tokens"):
            if not 1 <= getattr(self, name) <= BLOCK:
                raise ConfigError(f"{name}: got {getattr(self, name):g}, expected 1 to {BLOCK}")
        output = self.output_tokens
        if output is not None and not 1 <= output < self.context:
            raise ConfigError(f"output_tokens: got {output}, expected 1 to {self.context - 1}")

    @property
    def steps(self) -> float:
        """Denoiser passes a block."""
        known = self.tokens_per_nfe
        if known is None:
            known = commits.tokens_per_nfe(self.text, self.gamma)
        return commits.steps_for(known)
