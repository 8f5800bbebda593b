"""Bytes that one committed block of one row puts on the wire, at the shapes of the 30B model.

    python -m benchmarks.channel

Builds a row's state at two context lengths, logs one block, and compares the delta that a mirror
replays with the whole state. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json

import torch

from twotower.kernels.replay import ReplayWeights
from twotower.towers.config import MAMBA, TwoTowerConfig
from twotower.towers.state import ContextState, LayerLog

NEMOTRON_30B = TwoTowerConfig(
    vocab_size=131072,
    hidden_size=2688,
    layer_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    conv_kernel=4,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    intermediate_size=1856,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    max_position_embeddings=262144,
)


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--block", type=int, default=16)
    parser.add_argument("--contexts", type=int, nargs="+", default=[1024, 102400])
    args = parser.parse_args()
    print(json.dumps({n: block_bytes(n, args.block) for n in args.contexts}, indent=2))


def block_bytes(context: int, block: int) -> dict[str, float]:
    """MB of the delta and of the whole state after one block on `context` tokens, in bf16."""
    config, kind = NEMOTRON_30B, torch.bfloat16
    state = ContextState(config, context + block, torch.device("cpu"), kind)
    state.position = context
    layers = len(config.layers_of(MAMBA))
    log = LayerLog(
        torch.zeros(block, config.conv_dim, dtype=kind),
        torch.zeros(block, config.mamba_num_heads, dtype=kind),
    )
    weights = ReplayWeights(
        torch.zeros(config.conv_dim, config.conv_kernel, dtype=kind),
        torch.zeros(config.conv_dim, dtype=kind),
        torch.zeros(config.mamba_num_heads),
        torch.zeros(config.mamba_num_heads),
        config.n_groups,
    )
    state.append([log] * layers, block)
    state.advance([weights] * layers, block)
    delta = state.export(context)
    assert delta.is_delta
    whole = state.export(context)
    return {"delta_mb": delta.num_bytes / 1e6, "whole_state_mb": whole.num_bytes / 1e6}


if __name__ == "__main__":
    main()
