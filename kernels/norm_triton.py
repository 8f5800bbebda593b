# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The norms of norm.py as Triton kernels: a program per token, or per token and group.

A token's numbers are loaded once, computed in fp32 and rounded where they are stored. The tile is
as wide as the norm, so that a token's bits depend on that token alone. Sources as in norm.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.experts_triton import sum_of_slots
from twotower.kernels.moe import SlotOutputs
from twotower.kernels.norm import Modulation

# Tiles of at least this width get eight warps: a thread holds at most 16 numbers of a tile of 4096.
_WIDE = 2048
# Numbers of a group per warp: eight a thread, 32 bytes of fp32.
_PER_WARP = 256


@triton.jit
def _add_norm_kernel(
    hidden,
    delta,
    ids,
    scores,
    gate,
    gate_index,
    weight,
    modulation,
    modulation_index,
    total,
    out,
    hidden_stride,
    delta_stride,
    ids_stride,
    scores_stride,
    gate_stride,
    gate_part_stride,
    modulation_stride,
    modulation_part_stride,
    width,
    eps,
    has_delta: tl.constexpr,
    slots: tl.constexpr,
    parts: tl.constexpr,
    has_gate: tl.constexpr,
    has_modulation: tl.constexpr,
    modulate_first: tl.constexpr,
    block: tl.constexpr,
):
    """A program per token: the residual sum to `total`, its norm to `out`. With `slots` > 0 `delta`
    holds what the token's experts gave, which is added up here and rounded as a tensor would be."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    inside = columns < width
    x = tl.load(hidden + token * hidden_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if has_delta:
        if slots > 0:
            added = sum_of_slots(
                delta, ids, scores, token, columns, width, ids_stride, scores_stride, slots, parts
            )
            added = added.to(total.dtype.element_ty).to(tl.float32)
        else:
            added = tl.load(delta + token * delta_stride + columns, mask=inside, other=0.0)
            added = added.to(tl.float32)
        if has_gate:
            entry = gate + tl.load(gate_index + token) * gate_stride
            part = tl.load(entry + 2 * gate_part_stride + columns, mask=inside, other=0.0)
            added = part.to(tl.float32) * added
        # The norm is that of the stream as stored, after rounding to its dtype.
        stored = (x + added).to(total.dtype.element_ty)
        tl.store(total + token * width + columns, stored, mask=inside)
        x = stored.to(tl.float32)
    if has_modulation:
        entry = modulation + tl.load(modulation_index + token) * modulation_stride
        shift = tl.load(entry + columns, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(entry + modulation_part_stride + columns, mask=inside, other=0.0)
        scale = scale.to(tl.float32)
        if modulate_first:
            x = x * (1.0 + scale) + shift
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    x = x * (1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)) * w
    if has_modulation and not modulate_first:
        x = x * (1.0 + scale) + shift
    tl.store(out + token * width + columns, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _group_norm_kernel(
    y, z, weight, out, y_stride, z_stride, out_stride, width, eps, block: tl.constexpr
):
    """A program per token and group of `width` channels."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    columns = tl.arange(0, block)
    inside = columns < width
    columns += group * width
    values = tl.load(y + token * y_stride + columns, mask=inside, other=0.0).to(tl.float32)
    gates = tl.load(z + token * z_stride + columns, mask=inside, other=0.0).to(tl.float32)
    # exp of minus the magnitude cannot overflow.
    shut = tl.exp(-tl.abs(gates))
    u = values * gates * (tl.where(gates < 0.0, shut, 1.0) / (1.0 + shut))
    w = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    u = u * (1.0 / tl.sqrt(tl.sum(u * u, axis=0) / width + eps)) * w
    tl.store(out + token * out_stride + columns, u.to(out.dtype.element_ty), mask=inside)


def add_norm(
    hidden: Tensor,
    delta: Tensor | SlotOutputs | None,
    gate: Modulation | None,
    weight: Tensor,
    eps: float,
    modulation: Modulation | None,
    modulate_first: bool,
) -> tuple[Tensor, Tensor]:
    """Residual stream and normed input [T, H] each, as `norm.add_norm`; rounds at its two outputs
    only. Outputs of experts that are not added up yet are added up here."""
    tokens, width = hidden.shape
    assert weight.shape == (width,)
    assert gate is None or delta is not None
    assert delta is None or delta.shape == hidden.shape
    added = _Delta.of(delta, hidden)
    for tensor in (hidden, weight, added.values):
        assert tensor.stride(-1) == 1
    out = torch.empty((tokens, width), dtype=hidden.dtype, device=hidden.device)
    total = hidden if delta is None else torch.empty_like(out)
    if tokens:
        block = triton.next_power_of_2(width)
        # A tensor that a flag turns off is not read: `hidden` is passed in its stead.
        _add_norm_kernel[tokens,](
            hidden,
            added.values,
            added.ids,
            added.scores,
            *_pointers(gate, hidden),
            weight,
            *_pointers(modulation, hidden),
            total,
            out,
            hidden.stride(0),
            added.values.stride(0),
            added.ids.stride(0),
            added.scores.stride(0),
            *_strides(gate, hidden),
            *_strides(modulation, hidden),
            width,
            eps,
            delta is not None,
            added.slots,
            added.parts,
            gate is not None,
            modulation is not None,
            modulate_first,
            block,
            num_warps=8 if block >= _WIDE else 4,
        )
    return total, out


@dataclass(frozen=True)
class _Delta:
    """A delta's tensors, `hidden` for what it has not, and the slots and parts of experts' outputs
    (0 and 0 of a tensor)."""

    values: Tensor
    ids: Tensor
    scores: Tensor
    slots: int = 0
    parts: int = 0

    @classmethod
    def of(cls, delta: Tensor | SlotOutputs | None, hidden: Tensor) -> _Delta:
        if not isinstance(delta, SlotOutputs):
            return cls(hidden if delta is None else delta, hidden, hidden)
        assert delta.by_slot.is_contiguous()
        assert delta.ids.stride(1) == delta.scores.stride(1) == 1
        slots = delta.ids.shape[1]
        parts = delta.by_slot.shape[1] - slots
        return cls(delta.by_slot, delta.ids, delta.scores, slots, parts)


def gated_group_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """[T, D] in z's dtype, as `norm.gated_group_norm`; rounds at the output only."""
    tokens, total = y.shape
    width = total // groups
    assert z.shape == y.shape
    assert weight.shape == (width * groups,)
    for tensor in (y, z, weight):
        assert tensor.stride(-1) == 1
    out = torch.empty((tokens, total), dtype=z.dtype, device=z.device)
    if tokens:
        block = triton.next_power_of_2(width)
        warps = min(8, max(1, block // _PER_WARP))
        _group_norm_kernel[tokens, groups](
            *(y, z, weight, out, y.stride(0), z.stride(0), total, width, eps, block),
            num_warps=warps,
        )
    return out


def _pointers(modulation: Modulation | None, unread: Tensor) -> tuple[Tensor, Tensor]:
    """Table and index of a modulation; `unread` twice if there is none."""
    return (unread, unread) if modulation is None else (modulation.table, modulation.index)


def _strides(modulation: Modulation | None, hidden: Tensor) -> tuple[int, int]:
    """Strides of the table's entries and of an entry's parts; zeros if there is no modulation."""
    if modulation is None:
        return 0, 0
    table, index = modulation.table, modulation.index
    assert table.shape[1:] == (3, hidden.shape[1])
    assert index.shape == hidden.shape[:1]
    for tensor in (table, index):
        assert tensor.stride(-1) == 1
    return table.stride(0), table.stride(1)
