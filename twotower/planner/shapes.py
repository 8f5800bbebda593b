"""Model shapes of benchmarks and plans, by name."""

from __future__ import annotations

from dataclasses import replace

from twotower.towers.config.model_config import TwoTowerConfig

# The released model, Nemotron-Labs-TwoTower-30B-A3B.
LARGE = TwoTowerConfig(
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
# The same kinds of layers, small enough for a few seconds on a CPU.
TINY = replace(
    LARGE,
    vocab_size=256,
    hidden_size=64,
    layer_pattern="MEM*EM-",
    num_attention_heads=4,
    head_dim=16,
    mamba_num_heads=4,
    mamba_head_dim=16,
    n_groups=2,
    ssm_state_size=16,
    n_routed_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    moe_shared_expert_intermediate_size=64,
    intermediate_size=64,
    max_position_embeddings=65536,
)
PRESETS = {"30b": LARGE, "tiny": TINY}
