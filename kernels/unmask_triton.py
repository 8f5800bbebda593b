# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`unmask.predict` as Triton kernels: the first reads the logits once and writes a few partial
results per tile of the vocabulary, the second merges a line's tiles in their order.

    tile:  maximum and sum of exponentials; best score with its token; number of non-finite logits
    line:  token = best of the bests; log-probability = its logit - log of the merged sum

Scores at a temperature are taken relative to the tile's peak, so that no quotient overflows; the
merge makes them relative to the line's. The tile size depends on V only, so a line's bits depend on
that line only. Source of the merged sum: Milakov and Gimelshein 2018, "Online normalizer
calculation for softmax".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.unmask import SamplingBatch

# 16 logits a thread: with fewer, reductions would cost more than loads.
_TILE = 2048
# The least temperature by which a score is divided: a GPU flushes smaller numbers to 0.
_LEAST = tl.constexpr(2.0**-126)


@triton.jit
def _philox(key, c0, c1, c2, c3):
    """Philox4x32-10 as in philox.py: key int64, counters uint32 -> four random words uint32."""
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        high, low = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
        c0 = tl.umulhi(c2, 0xCD9E8D57) ^ c1 ^ k0
        c1 = c2 * 0xCD9E8D57
        c2 = high ^ c3 ^ k1
        c3 = low
        k0 += 0x9E3779B9
        k1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def _gumbel(key, position, step, domain, first, tile: tl.constexpr):
    """Gumbel noise [tile] fp32 of the tokens from `first` on, a multiple of 4."""
    quads = first // 4 + tl.arange(0, tile // 4)
    w0, w1, w2, w3 = _philox(
        key, position.to(tl.uint32), step.to(tl.uint32), quads.to(tl.uint32), domain.to(tl.uint32)
    )
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((words >> 9).to(tl.float32) + 0.5) * (1.0 / 8388608.0)
    return -tl.log(-tl.log(tl.maximum(uniform, 1e-10)))


@triton.jit
def _tile_kernel(
    logits,
    draw_scores,
    temperatures,
    keys,
    positions,
    steps,
    domains,
    excluded,
    barred,
    partials,
    tokens,
    nonfinite,
    logits_stride,
    scores_stride,
    vocab,
    lines,
    has_scores: tl.constexpr,
    tile: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (line, tile): maximum, sum, peak and best score to `partials` [4, lines, tiles]
    fp32, the best score's token to `tokens` and the number of non-finite logits to `nonfinite`."""
    wait(waits)
    line, index, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ids = index * tile + tl.arange(0, tile)
    inside = ids < vocab
    neg_inf = float("-inf")
    wide = tl.load(logits + line * logits_stride + ids, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(wide) < float("inf")
    counted = inside & finite & (ids != tl.load(excluded + line))
    wide = tl.where(counted, wide, neg_inf)
    maximum = tl.max(wide, axis=0)
    # A tile without any counted logit adds 0 to the sum: its maximum stays -inf, without a NaN.
    exponents = tl.where(counted, wide - tl.where(maximum > neg_inf, maximum, 0.0), neg_inf)
    allowed = counted & (ids != tl.load(barred + line))
    scores = wide
    if has_scores:
        scores = tl.load(draw_scores + line * scores_stride + ids, mask=inside, other=0.0)
        # Scores of a line with a NaN logit are all NaN, and the line still needs some token.
        allowed = allowed & (scores == scores)
    scores = tl.where(allowed, scores, neg_inf)
    peak = tl.full([], 0.0, tl.float32)
    temperature = tl.load(temperatures + line)
    if temperature > 0.0:
        if not has_scores:
            peak = tl.max(scores, axis=0)
            above = scores - tl.where(peak > neg_inf, peak, 0.0)
            scores = above / tl.maximum(temperature, _LEAST)
        scores += _gumbel(
            tl.load(keys + line),
            tl.load(positions + line),
            tl.load(steps + line),
            tl.load(domains + line),
            index * tile,
            tile,
        )
    best = tl.max(scores, axis=0)
    tile_offset = line * tiles + index
    size = tl.cast(lines, tl.int64) * tiles
    tl.store(partials + tile_offset, maximum)
    tl.store(partials + size + tile_offset, tl.sum(tl.exp(exponents), axis=0))
    tl.store(partials + 2 * size + tile_offset, peak)
    tl.store(partials + 3 * size + tile_offset, best)
    tl.store(tokens + tile_offset, tl.min(tl.where(scores == best, ids, vocab - 1), axis=0))
    tl.store(nonfinite + tile_offset, tl.sum((inside & ~finite).to(tl.int32), axis=0))


@triton.jit
def _merge_kernel(
    logits,
    temperatures,
    partials,
    tile_tokens,
    nonfinite,
    tokens,
    confidences,
    log_probs,
    finite,
    logits_stride,
    tiles,
    lines,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per line: token, confidence and log-probability from the partials of its tiles."""
    wait(waits)
    line = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    inside = index < tiles
    neg_inf = float("-inf")
    tile_offsets = line * tiles + index
    size = tl.cast(lines, tl.int64) * tiles
    maxima = tl.load(partials + tile_offsets, mask=inside, other=neg_inf)
    sums = tl.load(partials + size + tile_offsets, mask=inside, other=0.0)
    peaks = tl.load(partials + 2 * size + tile_offsets, mask=inside, other=neg_inf)
    scores = tl.load(partials + 3 * size + tile_offsets, mask=inside, other=neg_inf)
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum > neg_inf, maximum, 0.0)
    # The maximum itself adds 1: the sum is less only where no logit is finite.
    total = tl.maximum(tl.sum(sums * tl.exp(maxima - maximum), axis=0), 1.0)
    temperature = tl.load(temperatures + line)
    if temperature > 0.0:
        peak = tl.max(peaks, axis=0)
        above = peaks - tl.where(peak > neg_inf, peak, 0.0)
        scores += above / tl.maximum(temperature, _LEAST)
    best = tl.max(scores, axis=0)
    winner = tl.min(tl.where(scores == best, index, tiles - 1), axis=0)
    token = tl.load(tile_tokens + line * tiles + winner)
    logit = tl.load(logits + line * logits_stride + token).to(tl.float32)
    log_prob = logit - maximum - tl.log(total)
    nonfinite_count = tl.sum(tl.load(nonfinite + tile_offsets, mask=inside, other=0), axis=0)
    tl.store(tokens + line, token.to(tl.int64))
    tl.store(confidences + line, tl.exp(log_prob))
    tl.store(log_probs + line, log_prob)
    tl.store(finite + line, nonfinite_count == 0)


def predict(
    logits: Tensor, batch: SamplingBatch, draw_scores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, confidences, log-probabilities and finite flags of logits [M, V], as
    `unmask.predict`. Noise is computed only for lines whose temperature is above 0."""
    count, vocab = logits.shape
    scores = logits if draw_scores is None else draw_scores
    assert scores.shape == logits.shape
    for matrix in (logits, scores):
        assert matrix.stride(1) == 1
    device = logits.device
    tile = min(_TILE, max(16, triton.next_power_of_2(vocab)))
    tiles = triton.cdiv(vocab, tile)
    partials = torch.empty((4, count, tiles), dtype=torch.float32, device=device)
    tile_tokens, nonfinite = torch.empty((2, count, tiles), dtype=torch.int32, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    confidences, log_probs = torch.empty((2, count), dtype=torch.float32, device=device)
    finite = torch.empty(count, dtype=torch.bool, device=device)
    arguments = _per_line(batch, count)
    if count:
        _tile_kernel[count, tiles](
            logits,
            scores,
            *arguments,
            partials,
            tile_tokens,
            nonfinite,
            logits.stride(0),
            scores.stride(0),
            vocab,
            count,
            draw_scores is not None,
            tile,
            num_warps=4,
            **overlap(logits.device),
        )
        _merge_kernel[count,](
            logits,
            arguments[0],
            partials,
            tile_tokens,
            nonfinite,
            tokens,
            confidences,
            log_probs,
            finite,
            logits.stride(0),
            tiles,
            count,
            triton.next_power_of_2(tiles),
            num_warps=1,
            **overlap(logits.device),
        )
    return tokens, confidences, log_probs, finite


def _per_line(batch: SamplingBatch, count: int) -> tuple[Tensor, ...]:
    """The tensors of `batch`, [count] each, in the order of the tile kernel's arguments."""
    arguments = (
        batch.temperature,
        batch.key,
        batch.position,
        batch.step,
        batch.domain,
        batch.excluded,
        batch.barred,
    )
    for tensor in arguments:
        assert tensor.shape == (count,)
    return tuple(tensor.contiguous() for tensor in arguments)
