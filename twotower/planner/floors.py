"""Floors: the least time that a pass can take, from its shapes and a device's ceilings.

Every operator is one launch that reads each of its inputs once and writes each of its outputs
once; it takes the largest of its bytes over the copy bandwidth, its products over the matrix rate
and its fp32 or fp64 work over the plain rate. Operators run one after another, so a pass takes the
sum. Weights count in the bytes in which they are stored, experts only where a token chose them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from twotower.towers.config.model_config import ATTENTION, MAMBA, MLP, MOE, TwoTowerConfig

# An extension reads a block into the context; a verification puts it through the head as well.
PassKind = Literal["denoise", "ar", "extend", "verify"]
# The share of a block's positions that is masked, averaged over all passes of recorded blocks.
MASKED = 0.6
# Products in 8 bits over those in bf16, by the datasheets of Hopper and Blackwell.
FP8_GAIN = 2.0
_FP32, _SCORE = 4, 8


@dataclass(frozen=True)
class Ceilings:
    """Measured rates of a device: bytes/s of a copy (read and written), FLOP/s of a large matrix
    product in the model's dtype, in fp32 and in 8 bits. What was not measured in 8 bits (None) is
    taken for twice the rate in the model's dtype."""

    bytes_per_s: float
    matmul_flops: float
    wide_flops: float
    fp8_flops: float | None = None

    @property
    def narrow_flops(self) -> float:
        """FLOP/s of products in 8 bits, measured or assumed."""
        return FP8_GAIN * self.matmul_flops if self.fp8_flops is None else self.fp8_flops


@dataclass(frozen=True)
class PassShape:
    """A pass over `rows` rows of `length` tokens after `context` tokens each, in which the tokens
    of a layer chose `unique` different experts. `head_tokens` go through the head; `moves_state`
    means that the Mamba states are written back. `value_bytes` are those of a value of weights and
    activations, `expert_bytes` those of a routed expert's; with `fp8_products` routed experts
    multiply 8-bit values."""

    rows: int
    length: int
    context: int
    unique: float
    head_tokens: float
    moves_state: bool
    value_bytes: int = 2
    expert_bytes: int = 2
    fp8_products: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class Work:
    """One operator, launched `launches` times in a pass: bytes and operations of each launch."""

    name: str
    launches: int
    num_bytes: float
    flops: float = 0.0
    wide_flops: float = 0.0
    fp8_flops: float = 0.0

    def seconds(self, ceilings: Ceilings) -> float:
        """The least time of all its launches."""
        each = max(
            self.num_bytes / ceilings.bytes_per_s,
            self.flops / ceilings.matmul_flops,
            self.wide_flops / ceilings.wide_flops,
            self.fp8_flops / ceilings.narrow_flops,
        )
        return self.launches * each


def shape_of(
    kind: PassKind,
    config: TwoTowerConfig,
    rows: int,
    context: int,
    block: int,
    *,
    unique: float | None = None,
    masked: float = 1.0,
    value_bytes: int = 2,
    expert_bytes: int = 2,
    fp8_products: bool = False,
) -> PassShape:
    """The shape of a pass of a kind. `unique` None means that all tokens choose independently;
    `masked` is the share of a denoiser's positions that goes through the head."""
    length = 1 if kind == "ar" else block
    if unique is None:
        unique = expected_unique(config, rows * length)
    tokens = float(rows * length)
    heads = {"denoise": tokens * masked, "ar": tokens, "extend": 0.0, "verify": tokens}
    return PassShape(
        rows,
        length,
        context,
        unique,
        heads[kind],
        kind != "denoise",
        value_bytes,
        expert_bytes,
        fp8_products,
    )


def pass_works(config: TwoTowerConfig, shape: PassShape) -> list[Work]:
    """The operators that a pass launches."""
    works = [
        _norms(config, shape),
        *_mamba(config, shape),
        *_moe(config, shape),
        *_mlp("mlp", len(config.layers_of(MLP)), config.intermediate_size, config, shape),
        *_attention(config, shape),
        _product("head", 1, config.hidden_size, config.vocab_size, shape, shape.head_tokens),
    ]
    return [
        work for work in works if work.launches and (work.name != "head" or shape.head_tokens > 0)
    ]


def floor_seconds(works: Sequence[Work], ceilings: Ceilings) -> float:
    """The least time of a pass."""
    return sum(work.seconds(ceilings) for work in works)


def num_bytes(works: Sequence[Work]) -> float:
    """Bytes that a pass must move."""
    return sum(work.launches * work.num_bytes for work in works)


def expected_unique(config: TwoTowerConfig, draws: float) -> float:
    """Mean number of experts chosen by at least one of `draws` tokens that choose independently."""
    experts = config.n_routed_experts
    missed: float = (1.0 - config.num_experts_per_tok / experts) ** draws
    return experts * (1.0 - missed)


def _norms(config: TwoTowerConfig, shape: PassShape) -> Work:
    """Residual, gate, norm and modulation in one launch: two tensors read, two written."""
    return Work(
        "norm", config.num_layers, 4 * shape.tokens * config.hidden_size * shape.value_bytes
    )


def _mamba(config: TwoTowerConfig, shape: PassShape) -> list[Work]:
    layers, tokens = len(config.layers_of(MAMBA)), shape.tokens
    inner, n = config.d_inner, config.ssm_state_size
    projected = inner + config.conv_dim + config.mamba_num_heads
    history = (config.conv_kernel - 1) * config.conv_dim * shape.value_bytes
    state = inner * n * _FP32 + history
    moved = shape.rows * state * (2 if shape.moves_state else 1)
    # From the state, inside the block, and into the state.
    products = 2 * tokens * inner * n * (2 if shape.moves_state else 1)
    products += 2 * tokens * shape.length * (inner + config.n_groups * n)
    scan = Work(
        "scan",
        layers,
        moved + tokens * (projected + inner) * shape.value_bytes,
        wide_flops=products,
    )
    return [
        _product("in_proj", layers, config.hidden_size, projected, shape, tokens),
        scan,
        _product("out_proj", layers, inner, config.hidden_size, shape, tokens),
    ]


def _moe(config: TwoTowerConfig, shape: PassShape) -> list[Work]:
    layers, tokens, hidden = len(config.layers_of(MOE)), shape.tokens, config.hidden_size
    width, picks = config.moe_intermediate_size, config.num_experts_per_tok
    scales = _FP32 if shape.expert_bytes < shape.value_bytes else 0
    matrix = width * hidden * shape.expert_bytes
    flops = 2.0 * tokens * picks * width * hidden
    wide, narrow = (0.0, flops) if shape.fp8_products else (flops, 0.0)
    router = Work(
        "router",
        layers,
        (config.n_routed_experts + tokens) * hidden * shape.value_bytes + tokens * picks * _SCORE,
        wide_flops=2 * tokens * config.n_routed_experts * hidden,
    )
    up = shape.unique * (matrix + width * scales)
    down = shape.unique * (matrix + hidden * scales)
    shared = config.moe_shared_expert_intermediate_size
    return [
        router,
        Work(
            "experts_up",
            layers,
            up + tokens * (hidden + picks * width) * shape.value_bytes,
            wide,
            fp8_flops=narrow,
        ),
        Work(
            "experts_down",
            layers,
            down + tokens * picks * (width + hidden) * shape.value_bytes,
            wide,
            fp8_flops=narrow,
        ),
        *_mlp("shared", layers, shared, config, shape),
    ]


def _mlp(
    name: str, layers: int, width: int, config: TwoTowerConfig, shape: PassShape
) -> list[Work]:
    hidden = config.hidden_size
    return [
        _product(f"{name}_up", layers, hidden, width, shape, shape.tokens),
        _product(f"{name}_down", layers, width, hidden, shape, shape.tokens),
    ]


def _attention(config: TwoTowerConfig, shape: PassShape) -> list[Work]:
    layers, tokens, size = len(config.layers_of(ATTENTION)), shape.tokens, shape.value_bytes
    queries = config.num_attention_heads * config.head_dim
    keys = 2 * config.num_key_value_heads * config.head_dim
    seen = Work(
        "attention",
        layers,
        (shape.rows * shape.context * keys + 2 * tokens * queries) * size,
        4 * tokens * queries * (shape.context + shape.length),
    )
    return [
        _product("qkv", layers, config.hidden_size, queries + keys, shape, tokens),
        seen,
        _product("o_proj", layers, queries, config.hidden_size, shape, tokens),
    ]


def _product(
    name: str, layers: int, inputs: int, outputs: int, shape: PassShape, tokens: float
) -> Work:
    """A dense product; the head's outputs are not written, only the tokens chosen from them."""
    written = 0 if name == "head" else outputs
    moved = inputs * outputs + tokens * (inputs + written)
    return Work(name, layers, moved * shape.value_bytes, 2 * tokens * inputs * outputs)
