"""Memory that a GPU's passes take beside weights and states, by formula.

States get the rest of a device. The memory of a pass follows from its shape and is reserved before:
a pool that takes too much would fail at the first long prompt, under load.
"""

from __future__ import annotations

import torch

from twotower.kernels.attention import MAX_SPLITS, SHORT_TOKENS
from twotower.kernels.mamba_scan import SCAN_SCRATCH_BYTES
from twotower.kernels.replay import SCRATCH_BYTES
from twotower.towers.config.model_config import ATTENTION, MAMBA, MLP, MOE, TwoTowerConfig
from twotower.towers.engine.buckets import (
    GRAPH_TOKENS,
    ROW_BUCKETS,
    bucket_for,
    packed_bucket_for,
    rows_at_once,
)
from twotower.towers.state.update import most_delta_tokens

# Workspaces of libraries, 32 MiB a stream, and small tensors of a step.
_FIXED_BYTES = 256 << 20
# The allocator's blocks are larger than what they hold.
_SLACK = 1.1
_FP32 = 4
# Lengths of blocks that clients use side by side.
_BLOCK_LENGTHS = 4


def log_bytes(config: TwoTowerConfig, dtype: torch.dtype, tokens: int) -> int:
    """Raw projections of so many tokens, which a context tower keeps until it has advanced."""
    per_token = config.conv_dim + config.mamba_num_heads
    return len(config.layers_of(MAMBA)) * per_token * tokens * dtype.itemsize


def unsent_bytes(config: TwoTowerConfig, dtype: torch.dtype, rows: int) -> int:
    """Most that so many rows keep of their logs for mirrors that are behind."""
    return log_bytes(config, dtype, rows * max(0, most_delta_tokens(config)))


def layer_bytes(config: TwoTowerConfig, dtype: torch.dtype, tokens: int) -> int:
    """Tensors of the widest layer over so many tokens, and the residual stream around it."""
    size, hidden = dtype.itemsize, config.hidden_size
    widths = [0]
    if config.layers_of(MAMBA):
        projected = config.d_inner + config.conv_dim + config.mamba_num_heads
        # Beside them conv's output, the scan's in fp32 and the gated one.
        inner = (config.conv_dim + config.d_inner) * size + config.d_inner * _FP32
        widths.append(projected * size + inner + config.mamba_num_heads * _FP32)
    if config.layers_of(ATTENTION):
        queries = config.num_attention_heads * config.head_dim
        keys = 2 * config.num_key_value_heads * config.head_dim
        widths.append((2 * queries + keys) * size)
    if config.layers_of(MOE):
        shared = config.moe_shared_expert_intermediate_size // config.moe_intermediate_size
        slots = config.num_experts_per_tok + shared
        # The router's input and scores are in fp64.
        router = 2 * (hidden + config.n_routed_experts) * _FP32
        # Where experts multiply 8-bit values: those of the tokens and of what is inside.
        narrow = config.num_experts_per_tok * config.moe_intermediate_size + hidden
        router += narrow if config.quantized_experts else 0
        widths.append(slots * (config.moe_intermediate_size + hidden) * size + router)
    if config.layers_of(MLP):
        widths.append(2 * config.intermediate_size * size)
    return tokens * (4 * hidden * size + max(widths))


def partial_bytes(config: TwoTowerConfig, rows: int, block: int) -> int:
    """Partial results of attention's splits, for rows of at most `block` new tokens; rows with more
    than SHORT_TOKENS are not split."""
    if not config.layers_of(ATTENTION):
        return 0
    lines = MAX_SPLITS * rows * min(block, SHORT_TOKENS) * config.num_attention_heads
    return lines * (config.head_dim + 2) * _FP32


def working_bytes(
    config: TwoTowerConfig,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    *,
    block: int = SHORT_TOKENS,
    reads_prompts: bool,
) -> int:
    """Bytes of a tower's largest pass: `tokens` tokens of up to `rows` rows with blocks of `block`.

    Graphs keep what a pass of blocks takes beside what passes without one take, and in a tower that
    reads prompts what a packed pass of up to GRAPH_TOKENS takes. Such a tower keeps the pass's log,
    replays it and scans long rows by their chunks; its pass may have as many logits as a verified
    draft of every row, a denoiser's those of all blocks.
    """
    graph_rows = min(bucket_for(min(rows, ROW_BUCKETS[-1])), rows_at_once(block))
    graph = graph_rows * block
    kept = max(graph, min(GRAPH_TOKENS, tokens)) if reads_prompts else graph
    peak = layer_bytes(config, dtype, tokens) + layer_bytes(config, dtype, kept)
    # A packed pass of rows longer than a step has so many, and one of padding behind them.
    packed = min(packed_bucket_for(rows), GRAPH_TOKENS // block) + 1 if reads_prompts else 0
    peak += partial_bytes(config, rows, block)
    peak += partial_bytes(config, max(graph_rows, packed), block)
    peak += (min(tokens, rows * block) + graph) * config.vocab_size * dtype.itemsize
    if reads_prompts:
        # The log of a pass, and twice that of graphs, which keep it with all that is projected:
        # older ones stay with older graphs.
        gates = len(config.layers_of(MAMBA)) * config.d_inner * kept * dtype.itemsize
        # Graphs keep their own scratch beside that of passes without one.
        peak += log_bytes(config, dtype, tokens) + 2 * (SCRATCH_BYTES + SCAN_SCRATCH_BYTES)
        peak += 2 * (log_bytes(config, dtype, kept) + gates)
    else:
        # Shift, scale and gate of every number of masked positions, for a few block lengths.
        table = (block + 1) * config.num_layers * 3 * config.hidden_size * dtype.itemsize
        peak += _BLOCK_LENGTHS * table
    return int(_SLACK * peak) + _FIXED_BYTES
