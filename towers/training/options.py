"""Options of a training run: folders, time, threads and shapes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from twotower.kernels.products import fastest_dtype
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.limits import MOST_THREADS
from twotower.towers.training.batches import BatchShape, MaskRule
from twotower.towers.training.loop import Budget

# 9.76 M parameters in both towers: with the tokenizer just under 20 MB in bf16.
SHIPPED_CONFIG = TwoTowerConfig(
    vocab_size=2048,
    hidden_size=256,
    layer_pattern="MEM*EM*E",
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=48,
    mamba_num_heads=8,
    mamba_head_dim=64,
    n_groups=2,
    ssm_state_size=32,
    conv_kernel=4,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    moe_shared_expert_intermediate_size=320,
    intermediate_size=512,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=4096,
)
# A year, and more steps than fit into a year.
_MOST_MINUTES, _MOST_STEPS = 366.0 * 24 * 60, 2**31 - 1
# Times the usual rates; with far less than that nothing but noise is learnt.
_MOST_RATE = 10.0
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _fastest() -> str:
    """The name of the dtype that this processor multiplies fastest."""
    fastest = fastest_dtype()
    return next(name for name, dtype in DTYPES.items() if dtype == fastest)


@dataclass(frozen=True)
class TrainingOptions:
    """A run from corpus to exported model.

    The model is written to `out_dir`, tokens and checkpoints to `work_dir`. A phase whose steps are
    given ignores its minutes. `corpus` defaults to the running interpreter's standard library,
    `dtype` to the dtype that this processor multiplies fastest.

    `start_from` is the folder of an exported model whose towers are trained on, with its config
    and tokenizer; a tower whose minutes are 0 stays as it is. `rate` is a factor of the learning
    rates: for a model that is trained on, less than 1.

    From the share `own_text_from` of the denoiser's time on, a share `own_text_share` of its rows
    is text of the context tower, and a share `own_block_share` has corpus text as contexts and the
    tower's own continuations as blocks. `draft_share` and `position_decay` (see `MaskRule`) hold
    for these rows only: they are what a draft of verified decoding meets.

    Raises ValueError for a value out of its limits.
    """

    out_dir: Path
    work_dir: Path
    context_minutes: float = 38.0
    own_text_minutes: float = 6.0
    denoiser_minutes: float = 40.0
    context_steps: int | None = None
    denoiser_steps: int | None = None
    threads: int = 2
    seed: int = 1
    dtype: str = field(default_factory=_fastest)
    compile: bool = False
    resume: bool = False
    corpus: Path | None = None
    config: TwoTowerConfig = SHIPPED_CONFIG
    shape: BatchShape = field(default_factory=BatchShape)
    start_from: Path | None = None
    rate: float = 1.0
    suffix_share: float = 0.5
    draft_share: float = 0.0
    position_decay: float = 1.0
    own_text_from: float = 0.5
    own_text_share: float = 0.5
    own_block_share: float = 0.0
    own_text_prompt: int = 64
    own_text_rows: int = 256
    held_out_batches: int = 4
    touch_bytes: int = 3_500_000_000

    def __post_init__(self) -> None:
        for name in ("context_minutes", "own_text_minutes", "denoiser_minutes"):
            value = getattr(self, name)
            if not 0.0 <= value <= _MOST_MINUTES:
                raise ValueError(f"{name}: got {value}, expected 0 to {_MOST_MINUTES:g}")
        for name, most in (
            ("context_steps", _MOST_STEPS),
            ("denoiser_steps", _MOST_STEPS),
            ("threads", MOST_THREADS),
        ):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name}: got {value}, expected 1 to {most}")
        for name in ("own_text_from", "own_text_share", "own_block_share"):
            value = getattr(self, name)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{name}: got {value}, expected 0 to 1")
        if self.own_text_share + self.own_block_share > 1.0:
            raise ValueError(
                f"own_block_share: got {self.own_block_share} beside an own_text_share of "
                f"{self.own_text_share}, expected at most 1 in all"
            )
        if not 0.0 < self.rate <= _MOST_RATE:
            raise ValueError(f"rate: got {self.rate}, expected above 0 and at most {_MOST_RATE:g}")
        # The shares of the mask rules are checked where they are made.
        _ = self.own_masks
        if self.start_from is not None and not (self.start_from / "config.json").is_file():
            raise ValueError(
                f"start_from: got {self.start_from}, expected the folder of an exported model"
            )
        # Seeds + 1 and + 2 are used too.
        if not 0 <= self.seed <= 2**63 - 3:
            raise ValueError(f"seed: got {self.seed}, expected 0 to {2**63 - 3}")
        if self.corpus is not None and not self.corpus.is_dir():
            raise ValueError(f"corpus: got {self.corpus}, expected a folder")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {sorted(DTYPES)}")
        if self.own_text_prompt % self.shape.block_size:
            raise ValueError(
                f"own_text_prompt: got {self.own_text_prompt}, "
                f"expected a multiple of the block size {self.shape.block_size}"
            )
        if self.config.use_bias or self.config.attention_bias or self.config.mlp_bias:
            raise ValueError("config: got projections with biases, expected none when training")

    @property
    def context_budget(self) -> Budget:
        """Length of the phase that trains the context tower."""
        return Budget(self.context_minutes, self.context_steps)

    @property
    def denoiser_budget(self) -> Budget:
        """Length of the phase that trains the denoiser."""
        return Budget(self.denoiser_minutes, self.denoiser_steps)

    @property
    def corpus_masks(self) -> MaskRule:
        """How the blocks of corpus text are masked."""
        return MaskRule(self.suffix_share)

    @property
    def own_masks(self) -> MaskRule:
        """How the blocks of the context tower's own text are masked."""
        return MaskRule(self.suffix_share, self.draft_share, self.position_decay)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]
