"""Writes text with the frozen context tower, on which the denoiser is trained too.

In decoding the denoiser reads the context tower's states of generated text, not of a corpus;
training on such text raises the number of tokens it commits per pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig
from twotower.towers.training.model import ContextMemory, TowerView, context_hidden
from twotower.towers.training.operators import PLAIN
from twotower.towers.training.parameters import CONTEXT, CONTEXT_HEAD


@dataclass
class _State:
    """The context tower's state of R rows, by layer: `ssm` [R, heads, N, P] fp32, `tails` (raw conv
    inputs) [R, K-1, Cd], `keys` and `values` [R, T, kv, hd], of which the first `used` of `length`
    are set."""

    ssm: dict[int, Tensor]
    tails: dict[int, Tensor]
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    used: int
    length: int

    @property
    def room(self) -> int:
        """The number of tokens that can still be written."""
        return self.length - self.used


@torch.no_grad()
def write_own_text(
    params: Mapping[str, Tensor],
    config: TwoTowerConfig,
    prompts: Tensor,
    length: int,
    block_size: int,
    temperatures: Tensor,
    generator: Generator,
) -> Tensor:
    """Continues `prompts` int64 [R, S], S whole blocks, to int64 [R, length].

    `temperatures` [R] are per row; 0 takes the likeliest token.
    """
    start = prompts.shape[1]
    # The memory holds states before each block: with one more block also those after the prompt.
    extended = F.pad(prompts, (0, block_size))
    hidden, memory = context_hidden(params, config, extended, block_size)
    state = _state_before(memory, start // block_size, start, length)
    written = _continue(params, config, hidden[:, start - 1], state, temperatures, generator)
    return torch.cat([prompts, written], dim=1)


@torch.no_grad()
def write_own_blocks(
    params: Mapping[str, Tensor],
    config: TwoTowerConfig,
    tokens: Tensor,
    block_size: int,
    temperatures: Tensor,
    generator: Generator,
) -> Tensor:
    """The tower's own blocks [R, m, L] in place of all blocks but the first of `tokens` int64
    [R, T]: each continues the tokens before it, whatever follows them in `tokens`.

    Greedy text soon repeats itself; so near to a corpus it does not yet. `temperatures` [R] are per
    row.
    """
    hidden, memory = context_hidden(params, config, tokens, block_size)
    blocks = []
    for block, start in enumerate(range(block_size, tokens.shape[1], block_size), 1):
        state = _state_before(memory, block, start, start + block_size)
        last = hidden[:, start - 1]
        blocks.append(_continue(params, config, last, state, temperatures, generator))
    return torch.stack(blocks, dim=1)


def _continue(
    params: Mapping[str, Tensor],
    config: TwoTowerConfig,
    hidden: Tensor,
    state: _State,
    temperatures: Tensor,
    generator: Generator,
) -> Tensor:
    """Tokens [R, n] that fill the room which `state` has left; `hidden` [R, H] is that of the last
    token before them."""
    tokens = []
    for _ in range(state.room):
        logits = F.linear(hidden, params[CONTEXT_HEAD]).float()
        tokens.append(draw_tokens(logits, temperatures, generator))
        if state.room > 1:
            hidden = _step(params, config, tokens[-1], state)
    return torch.stack(tokens, dim=1)


def _state_before(memory: ContextMemory, block: int, used: int, length: int) -> _State:
    """A copy of the state before block number `block`, after `used` tokens, with room for `length`
    tokens in all."""
    return _State(
        # A copy, since steps change it in place.
        {layer: border[:, block].float().clone() for layer, border in memory.borders.items()},
        {layer: tail[:, block] for layer, tail in memory.tails.items()},
        _extended(memory.keys, used, length),
        _extended(memory.values, used, length),
        used,
        length,
    )


def _extended(cached: dict[int, Tensor], used: int, length: int) -> dict[int, Tensor]:
    """K or V [R, T, ..] by layer -> copies [R, length, ..] with the first `used` tokens."""
    extended = {}
    for layer, value in cached.items():
        extended[layer] = value.new_zeros(value.shape[0], length, *value.shape[2:])
        extended[layer][:, :used] = value[:, :used]
    return extended


def draw_tokens(logits: Tensor, temperatures: Tensor, generator: Generator) -> Tensor:
    """Tokens [R] drawn from `logits` [R, V] at `temperatures` [R] by Gumbel-max; the likeliest
    token at temperature 0. Source: Maddison et al. 2014, section 2."""
    exponential = -torch.rand(logits.shape, generator=generator).clamp_min(1e-10).log()
    noise = -exponential.clamp_min(1e-10).log()
    return (logits + noise * temperatures[:, None]).argmax(-1)


def _step(
    params: Mapping[str, Tensor], config: TwoTowerConfig, token: Tensor, state: _State
) -> Tensor:
    """Final normed hidden [R, H] of a further `token` [R], by which `state` advances in place."""
    tower = TowerView(params, config, CONTEXT, PLAIN, None)
    hidden = F.embedding(token, params[f"{CONTEXT}.embeddings.weight"])
    for layer, kind in enumerate(config.layer_pattern):
        inner = tower.norm(f"layers.{layer}.norm", hidden)
        if kind == MAMBA:
            inner = _mamba_step(tower, layer, inner, state)
        elif kind == ATTENTION:
            inner = _attention_step(tower, layer, inner, state)
        else:
            inner = tower.per_token(layer, kind, inner)
        hidden = hidden + inner
    state.used += 1
    return tower.norm("norm_f", hidden)


def _mamba_step(tower: TowerView, layer: int, x: Tensor, state: _State) -> Tensor:
    config, mixer = tower.config, f"layers.{layer}.mixer"
    z, raw, dt = tower.projections(mixer, x)
    window = torch.cat([state.tails[layer], raw[:, None]], dim=1)
    state.tails[layer] = window[:, 1:]
    mixed = (window * tower.get(f"{mixer}.conv1d.weight")[:, 0].T).sum(1)
    bias = tower.find(f"{mixer}.conv1d.bias")
    mixed = F.silu(mixed if bias is None else mixed + bias).float()
    width, heads = config.n_groups * config.ssm_state_size, config.mamba_num_heads
    values, b, c = torch.split(mixed, [config.d_inner, width, width], dim=-1)
    share = heads // config.n_groups
    b, c = (
        torch.unflatten(part, -1, (config.n_groups, -1)).repeat_interleave(share, 1)
        for part in (b, c)
    )
    values = torch.unflatten(values, -1, (heads, -1))
    step = F.softplus(dt.float() + tower.get(f"{mixer}.dt_bias"))
    decay = torch.exp(-step * tower.get(f"{mixer}.A_log").exp())
    ssm = state.ssm[layer].mul_(decay[..., None, None])
    ssm.add_((b * step[..., None])[..., None] * values[:, :, None])
    y = (c[:, :, None] @ ssm)[:, :, 0] + tower.get(f"{mixer}.D")[:, None] * values
    gated = y.flatten(1).to(x.dtype) * F.silu(z)
    gated = torch.unflatten(gated, -1, (config.n_groups, -1))
    weight = tower.get(f"{mixer}.norm.weight").view(config.n_groups, -1)
    normed = tower.operators.rms_norm(gated, weight, config.layer_norm_epsilon)
    return tower.linear(f"{mixer}.out_proj", normed.flatten(1))


def _attention_step(tower: TowerView, layer: int, x: Tensor, state: _State) -> Tensor:
    mixer = f"layers.{layer}.mixer"
    q, k, v = tower.heads(mixer, x)
    state.keys[layer][:, state.used], state.values[layer][:, state.used] = k, v
    context_len = state.used + 1
    keys = state.keys[layer][:, :context_len].permute(0, 2, 3, 1)
    scores = (q * tower.config.head_dim**-0.5) @ keys
    share = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    out = share @ state.values[layer][:, :context_len].transpose(1, 2)
    return tower.linear(f"{mixer}.o_proj", out.flatten(1))
