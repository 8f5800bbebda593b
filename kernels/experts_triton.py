# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The experts of moe.py on a GPU: two products over all experts, a launch each, and a sum.

    sort      pairs (token, slot) by expert, cut into tiles of rows   expert_tiles_triton.py
    quantize  rows of a product in 8 bits, before each product        quantized_triton.py
    multiply  up with relu^2, then down                               programs walk the tiles
    combine   a token's results in the order of its slots             the norm behind it

A product is weight @ x^T: with 64 output channels as the first operand even 16 tokens use Hopper's
widest instruction. A shared MLP of Fs = n * F channels is n more experts that every token takes
with weight 1: as relu^2 is pointwise, its channels can be cut anywhere.

Products in 8 bits (`QuantizedExperts.products`) are those of the routed experts alone; tiles of the
shared MLP multiply in x's dtype in the same launch. Hopper's tensor cores add 8-bit products with
about 14 bits, so after every 128 of them the sum goes into an fp32 one.

Sources: Gale et al. 2022 (MegaBlocks), section 5, for products over groups of rows in one launch;
Liu et al. 2024 (DeepSeek-V3), section 3.3.2, for the sums of 8-bit products.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.determinism import is_deterministic
from twotower.kernels.elementwise import relu_squared
from twotower.kernels.expert_tiles_triton import Tiles, sort_by_expert
from twotower.kernels.launch_table import tuned
from twotower.kernels.linear_triton import linear
from twotower.kernels.moe import ExpertWeights, Routing, SlotOutputs
from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.quantized import ExpertProducts, QuantizedExperts
from twotower.kernels.quantized_triton import quantize_tokens

_COMBINE_BLOCK = 1024
# 8-bit products that a tensor core adds up before their sum goes into an fp32 one.
_NARROW_SUM = 128


@dataclass(frozen=True)
class Tiling:
    """Rows, output channels and inner length of a tile; warps and pipeline stages of a program, and
    programs per multiprocessor."""

    rows: int
    channels: int
    inner: int
    num_warps: int
    num_stages: int
    resident: int


@dataclass(frozen=True)
class _Tilings:
    """Tilings of one kind of products, `kernel` in a card's table: up to so many tokens of a pass,
    for more, beside fp32, and for any number."""

    kernel: str
    up_to: tuple[tuple[int, Tiling], ...]
    more: Tiling
    fp32: Tiling
    steady: Tiling

    def of(self, tokens: int, dtype: torch.dtype, device: torch.device | None) -> Tiling:
        if dtype == torch.float32:
            return self.fp32
        if is_deterministic():
            return self.steady
        default = next((tiling for most, tiling in self.up_to if tokens <= most), self.more)
        return default if device is None else tuned(self.kernel, tokens, default, device)


# By tokens of the pass: a tile should hold all rows of most experts, or weights are read twice.
# Exact fp32 products run on ordinary arithmetic units, whose operands fill the registers. For any
# number: reading a weight takes longer than multiplying it with 64 rows, few or many.
_TILINGS = _Tilings(
    "experts",
    (
        (8, Tiling(16, 128, 64, num_warps=4, num_stages=5, resident=2)),
        (128, Tiling(16, 64, 128, num_warps=4, num_stages=3, resident=3)),
        (512, Tiling(32, 64, 128, num_warps=4, num_stages=3, resident=3)),
        (1024, Tiling(64, 128, 64, num_warps=8, num_stages=4, resident=2)),
    ),
    more=Tiling(128, 128, 64, num_warps=8, num_stages=4, resident=1),
    fp32=Tiling(16, 32, 32, num_warps=4, num_stages=2, resident=4),
    steady=Tiling(64, 128, 64, num_warps=8, num_stages=4, resident=2),
)
# Products in 8 bits: `inner` counts 8-bit values. Tiles of the shared MLP have as many bytes, so
# fewer values, of the inner length.
_FP8_TILINGS = _Tilings(
    "experts_fp8",
    (
        (8, Tiling(16, 128, 128, num_warps=4, num_stages=5, resident=2)),
        (128, Tiling(16, 64, 256, num_warps=4, num_stages=3, resident=3)),
        (512, Tiling(32, 64, 256, num_warps=4, num_stages=3, resident=3)),
        (1024, Tiling(64, 64, 256, num_warps=4, num_stages=3, resident=2)),
    ),
    more=Tiling(128, 128, 128, num_warps=8, num_stages=4, resident=1),
    fp32=Tiling(16, 32, 128, num_warps=4, num_stages=2, resident=4),
    steady=Tiling(64, 64, 256, num_warps=4, num_stages=3, resident=2),
)


def tiling_of(tokens: int, dtype: torch.dtype, device: torch.device | None = None) -> Tiling:
    """The tiling for a pass of `tokens` tokens in `dtype`, on a device that of its card's table;
    inside `deterministic` one for all. Passes of the same tiling give a row the same bits."""
    return _TILINGS.of(tokens, dtype, device)


def fp8_tiling_of(tokens: int, dtype: torch.dtype, device: torch.device | None = None) -> Tiling:
    """`tiling_of` for products in 8 bits, beside a shared MLP in `dtype`."""
    return _FP8_TILINGS.of(tokens, dtype, device)


@dataclass(frozen=True)
class _Source:
    """Rows [R, K] that a product reads, in x's dtype, and for products in 8 bits those that the
    routed experts read quantized as well: `values` [n, K] and `scale` [n] of the first n rows."""

    wide: Tensor
    values: Tensor | None = None
    scale: Tensor | None = None

    @staticmethod
    def quantized(wide: Tensor, routed: int) -> _Source:
        """`wide` with its first `routed` rows in 8 bits too. Rows that no product wrote may hold
        anything, and become anything that none reads."""
        return _Source(wide, *quantize_tokens(wide[:routed]))


@dataclass(frozen=True)
class _Matrices:
    """Matrices [E, N, K] of the routed experts, their scale [E, N] if in 8 bits, and the shared
    MLP's matrix: row n of its part p starts at element p * `part_step` + n * its row stride."""

    routed: Tensor
    scale: Tensor | None
    shared: Tensor
    part_step: int


def experts(
    x: Tensor,
    ids: Tensor,
    scores: Tensor,
    up: ExpertWeights,
    down: ExpertWeights,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Tensor:
    """`slot_outputs`, added up in a launch of its own: [T, H] in x's dtype."""
    out = slot_outputs(x, Routing(ids, scores), up, down, shared_up, shared_down)
    return out if isinstance(out, Tensor) else _combine(out, None)


def slot_outputs(
    x: Tensor,
    routing: Routing,
    up: ExpertWeights,
    down: ExpertWeights,
    shared_up: Tensor,
    shared_down: Tensor,
) -> Tensor | SlotOutputs:
    """x [T, H], `routing` of T tokens, up [E, F, H], down [E, H, F], shared MLP [Fs, H] and
    [H, Fs] -> [T, H] in x's dtype: the chosen experts, weighted by their scores, plus the shared
    MLP; before the sum where Fs is a multiple of F.

    `up` and `down` are stacked tensors of x's dtype, or in 8 bits; id -1 is no expert. Every
    product is rounded to x's dtype; a token's results are summed in fp32 in the order of its slots,
    the shared MLP's last. Tiles are chosen by T (`tiling_of`, `fp8_tiling_of`): within one tiling a
    token gets the same bits in any batch, except where Fs is no multiple of F and torch multiplies
    the shared MLP. Inside `deterministic` there is one tiling, and our own product. Raises
    ValueError for weights of another form.
    """
    tokens, hidden = x.shape
    if tokens == 0:
        return torch.empty_like(x)
    routed_up, up_scale = _values_and_scale("up", up, x.dtype)
    routed_down, down_scale = _values_and_scale("down", down, x.dtype)
    count, width, _ = routed_up.shape
    parts = shared_up.shape[0] // width if shared_up.shape[0] % width == 0 else 0
    slots = routing.ids.shape[1]
    in_fp8 = _products_of(up, down) == "fp8"
    tiling = (fp8_tiling_of if in_fp8 else tiling_of)(tokens, x.dtype, x.device)
    tiles: Tiles | None = routing.tiles
    if tiles is None or tiles.rows != tiling.rows:
        tiles = sort_by_expert(routing.ids, count, tiling.rows)

    inner = _empty(x, tokens * (slots + parts), width)
    first = _Matrices(routed_up, up_scale, shared_up, width * shared_up.stride(0))
    source = _Source.quantized(x, tokens) if in_fp8 else _Source(x)
    _multiply(source, inner, first, tiles, tiling, (tokens, slots, parts), first=True)
    by_slot = _empty(x, tokens, slots + parts, hidden)
    second = _Matrices(routed_down, down_scale, shared_down, width)
    source = _Source.quantized(inner, tokens * slots) if in_fp8 else _Source(inner)
    _multiply(source, by_slot, second, tiles, tiling, (tokens, slots, parts), first=False)
    out = SlotOutputs(by_slot, routing.ids, routing.scores)
    if parts:
        return out
    product = linear if is_deterministic() else F.linear
    return _combine(out, product(relu_squared(product(x, shared_up)), shared_down))


def _empty(x: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device)


def _values_and_scale(
    name: str, weights: ExpertWeights, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Matrices [E, N, K] and the scale [E, N] of 8-bit weights; raises ValueError otherwise than
    for a stacked tensor of `dtype` or 8 bits."""
    if isinstance(weights, QuantizedExperts):
        return weights.values, weights.scale
    if not isinstance(weights, Tensor) or weights.dtype != dtype:
        kind = weights.dtype if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name}: got {kind}, expected a stacked tensor of {dtype} or 8 bits")
    return weights, None


def _products_of(up: ExpertWeights, down: ExpertWeights) -> ExpertProducts:
    """How the experts are multiplied; raises ValueError if `up` and `down` say different things."""
    first, second = (
        one.products if isinstance(one, QuantizedExperts) else "widened" for one in (up, down)
    )
    if first != second:
        raise ValueError(f"products: got {first!r} of up and {second!r} of down, expected the same")
    return first


def _multiply(
    source: _Source,
    target: Tensor,
    matrices: _Matrices,
    tiles: Tiles,
    tiling: Tiling,
    size: tuple[int, int, int],
    first: bool,
) -> None:
    """Multiplies the rows of `source` with their experts' and the shared matrices into `target`.

    `size`: tokens, slots and shared parts. The first product reads rows by token and writes relu^2
    of its results sorted by expert, those of the shared parts last; the second reads these and
    writes its rows by token and slot.
    """
    routed, scale, shared = matrices.routed, matrices.scale, matrices.shared
    wide, values, row_scale = source.wide, source.values, source.scale
    assert wide.stride(-1) == routed.stride(-1) == shared.stride(-1) == 1
    assert scale is None or scale.stride(-1) == 1
    assert values is None or (scale is not None and values.is_contiguous())
    tokens, slots, parts = size
    _, channels, length = routed.shape
    most = tiles.most + parts * triton.cdiv(tokens, tiling.rows)
    most *= triton.cdiv(channels, tiling.channels)
    _multiply_kernel[(min(most, _processors(wide.device) * tiling.resident),)](
        wide,
        wide if values is None else values,
        wide if row_scale is None else row_scale,
        target,
        routed,
        routed if scale is None else scale,
        shared,
        tiles.pairs,
        tiles.table,
        tokens,
        channels,
        wide.stride(0),
        routed.stride(0),
        routed.stride(1),
        0 if scale is None else scale.stride(0),
        matrices.part_step,
        shared.stride(0),
        length=length,
        first=first,
        quantized=scale is not None,
        in_fp8=values is not None,
        slots=slots,
        parts=parts,
        tile_rows=tiling.rows,
        tile_channels=tiling.channels,
        tile_inner=tiling.inner,
        shared_inner=tiling.inner if values is None else tiling.inner // wide.element_size(),
        narrow_sum=_NARROW_SUM,
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
        **overlap(target.device),
    )


@cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 2 under Triton's interpreter, so that programs walk many tiles."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def _product(
    weight,
    source,
    length: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_inner: tl.constexpr,
    narrow_sum: tl.constexpr,
):
    """weight [channels] and source [rows], pointers to the rows' starts -> [channels, rows] fp32.

    The sum runs along `length` in order; weights are converted to the source's dtype. Sums of 8-bit
    products are added up in fp32 every `narrow_sum` of them, 0 for products of other dtypes.
    """
    lanes = tl.arange(0, tile_inner)
    left = weight[:, None] + lanes[None, :]
    right = source[None, :] + lanes[:, None]
    total = tl.zeros([tile_channels, tile_rows], tl.float32)
    for start in range(0, length, tile_inner):
        if length % tile_inner == 0:
            w = tl.load(left)
            x = tl.load(right)
        else:
            within = lanes < length - start
            w = tl.load(left, mask=within[None, :], other=0.0)
            x = tl.load(right, mask=within[:, None], other=0.0)
        total = tl.dot(
            w.to(x.dtype), x, total, input_precision="ieee", max_num_imprecise_acc=narrow_sum
        )
        left += tile_inner
        right += tile_inner
    return total


@triton.jit(do_not_specialize=["tokens"])
def _multiply_kernel(
    source,
    values,
    row_scale,
    target,
    routed,
    scale,
    shared,
    pairs,
    table,
    tokens,
    channels,
    source_stride,
    expert_stride,
    channel_stride,
    scale_stride,
    part_step,
    shared_stride,
    length: tl.constexpr,
    first: tl.constexpr,
    quantized: tl.constexpr,
    in_fp8: tl.constexpr,
    slots: tl.constexpr,
    parts: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_inner: tl.constexpr,
    shared_inner: tl.constexpr,
    narrow_sum: tl.constexpr,
    waits: tl.constexpr,
):
    """Programs walk the tiles: those of the shared parts, then those of the table."""
    wait(waits)
    column_tiles = tl.cdiv(channels, tile_channels)
    token_tiles = tl.cdiv(tokens, tile_rows)
    shared_tiles = parts * token_tiles
    count = (shared_tiles + tl.load(table)) * column_tiles
    lanes = tl.arange(0, tile_rows)
    work = tl.program_id(0)
    while work < count:
        # Channels are the fastest index: concurrent programs read the same expert's rows.
        tile = work // column_tiles
        channel = (work % column_tiles) * tile_channels + tl.arange(0, tile_channels)
        inside = channel < channels
        # Rows and channels past the end repeat the last row or channel and are not stored.
        channel_index = tl.minimum(channel, channels - 1).to(tl.int64)
        is_shared = tile < shared_tiles
        if is_shared:
            index = (tile // token_tiles).to(tl.int64)
            token = (tile % token_tiles) * tile_rows + lanes
            real = token < tokens
            token = tl.minimum(token, tokens - 1)
            row = (slots + index) * tokens + token
            slot = slots + index + tl.zeros([tile_rows], tl.int64)
        else:
            entry = table + 1 + 3 * (tile - shared_tiles)
            index = tl.load(entry).to(tl.int64)
            rows = tl.load(entry + 2)
            real = lanes < rows
            row = (tl.load(entry + 1) + tl.minimum(lanes, rows - 1)).to(tl.int64)
            pair = tl.load(pairs + row)
            token = pair // slots
            slot = (pair % slots).to(tl.int64)
        read = token if first else row
        start = source + read.to(tl.int64) * source_stride
        shared_weight = shared + index * part_step + channel_index * shared_stride
        routed_weight = routed + index * expert_stride + channel_index * channel_stride
        if not quantized:
            if is_shared:
                routed_weight = shared_weight
            total = _product(routed_weight, start, length, tile_channels, tile_rows, tile_inner, 0)
        elif is_shared:
            total = _product(
                shared_weight, start, length, tile_channels, tile_rows, shared_inner, 0
            )
        elif in_fp8:
            narrow = values + read.to(tl.int64) * length
            total = _product(
                routed_weight, narrow, length, tile_channels, tile_rows, tile_inner, narrow_sum
            )
            total *= tl.load(scale + index * scale_stride + channel_index)[:, None]
            total *= tl.load(row_scale + read)[None, :]
        else:
            total = _product(routed_weight, start, length, tile_channels, tile_rows, tile_inner, 0)
            total *= tl.load(scale + index * scale_stride + channel_index)[:, None]
        if first:
            # maximum() would turn NaN into 0.
            total = tl.where(total < 0.0, 0.0, total)
            total *= total
            left = row
        else:
            left = token.to(tl.int64) * (slots + parts) + slot
        offsets = target + left[None, :] * channels + channel[:, None]
        tl.store(offsets, total.to(target.dtype.element_ty), mask=inside[:, None] & real[None, :])
        work += tl.num_programs(0)


def _combine(outputs: SlotOutputs, shared_out: Tensor | None) -> Tensor:
    """The weighted sum of a token's slots and parts, [T, H]; `shared_out` [T, H] is the shared MLP
    where it has no parts."""
    by_slot, ids, scores = outputs.by_slot, outputs.ids, outputs.scores
    assert ids.stride(1) == scores.stride(1) == 1
    tokens, all_slots, width = by_slot.shape
    out = _empty(by_slot, tokens, width)
    block = min(_COMBINE_BLOCK, triton.next_power_of_2(width))
    _combine_kernel[(tokens, triton.cdiv(width, block))](
        by_slot,
        ids,
        scores,
        by_slot if shared_out is None else shared_out,
        out,
        width,
        ids.stride(0),
        scores.stride(0),
        slots=ids.shape[1],
        parts=all_slots - ids.shape[1],
        has_shared_out=shared_out is not None,
        block=block,
        num_warps=4,
    )
    return out


@triton.jit
def _combine_kernel(
    by_slot,
    ids,
    scores,
    shared_out,
    out,
    width,
    ids_stride,
    scores_stride,
    slots: tl.constexpr,
    parts: tl.constexpr,
    has_shared_out: tl.constexpr,
    block: tl.constexpr,
):
    """A program per (token, tile of channels)."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * block + tl.arange(0, block)
    total = sum_of_slots(
        by_slot, ids, scores, token, column, width, ids_stride, scores_stride, slots, parts
    )
    within = column < width
    if has_shared_out:
        total += tl.load(shared_out + token * width + column, mask=within, other=0.0).to(tl.float32)
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=within)


@triton.jit
def sum_of_slots(
    by_slot,
    ids,
    scores,
    token,
    column,
    width,
    ids_stride,
    scores_stride,
    slots: tl.constexpr,
    parts: tl.constexpr,
):
    """The weighted sum of a token's slots and shared parts at these columns, fp32."""
    within = column < width
    token_rows = by_slot + token * (slots + parts) * width + column
    total = tl.zeros([column.shape[0]], tl.float32)
    for slot in tl.static_range(slots):
        # A slot without an expert was never written.
        chosen = tl.load(ids + token * ids_stride + slot) >= 0
        score = tl.load(scores + token * scores_stride + slot, mask=chosen, other=0.0)
        written = tl.where(chosen, width, 0)
        value = tl.load(token_rows + slot * width, mask=column < written, other=0.0)
        total += score * value.to(tl.float32)
    for part in tl.static_range(parts):
        total += tl.load(token_rows + (slots + part) * width, mask=within, other=0.0).to(tl.float32)
    return total
