# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""`unmask.predict` as Triton kernels: one reads the logits once and leaves a few numbers per tile
of the vocabulary, one merges a line's tiles in their order.

    tile:  maximum and sum of exponentials; best score with its token; whether all is finite
    line:  token = best of the bests; log-probability = its logit - log of the merged sum

Scores at a temperature are measured from the tile's own peak, so that no quotient overflows; the
merge moves them to the line's. The tile depends on V only, so a line's bits depend on that line
only. Source of the merged sum: Milakov and Gimelshein 2018, "Online normalizer calculation".
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.unmask import SamplingBatch

# 16 numbers a thread: fewer would cost more in reductions than in loads.
_TILE = 2048
# The least temperature by which a score is divided: a smaller one would count as 0 on a GPU.
_LEAST = tl.constexpr(2.0**-126)


@triton.jit
def _philox(key, c0, c1, c2, c3):
    """See `philox.philox4x32`: key int64, counters uint32 -> four words uint32."""
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
    """Noise of the tokens from `first` on, which is a multiple of 4, [tile] fp32."""
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
    figures,
    tokens,
    flawed,
    logits_stride,
    scores_stride,
    vocab,
    rows,
    has_scores: tl.constexpr,
    tile: tl.constexpr,
):
    """One tile of one line: maximum, sum, peak and best score to `figures` [4, lines, tiles]."""
    line, index, tiles = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    ids = index * tile + tl.arange(0, tile)
    inside = ids < vocab
    none = float("-inf")
    wide = tl.load(logits + line * logits_stride + ids, mask=inside, other=0.0).to(tl.float32)
    finite = tl.abs(wide) < float("inf")
    counted = inside & finite & (ids != tl.load(excluded + line))
    wide = tl.where(counted, wide, none)
    maximum = tl.max(wide, axis=0)
    # A tile with nothing in it adds nothing: its maximum stays -inf, and nothing is NaN.
    exponents = tl.where(counted, wide - tl.where(maximum > none, maximum, 0.0), none)
    allowed = counted & (ids != tl.load(barred + line))
    scores = wide
    if has_scores:
        scores = tl.load(draw_scores + line * scores_stride + ids, mask=inside, other=0.0)
        # Those of a line with a NaN logit are all NaN, and it still needs some token.
        allowed = allowed & (scores == scores)
    scores = tl.where(allowed, scores, none)
    peak = tl.full([], 0.0, tl.float32)
    temperature = tl.load(temperatures + line)
    if temperature > 0.0:
        if not has_scores:
            peak = tl.max(scores, axis=0)
            above = scores - tl.where(peak > none, peak, 0.0)
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
    place = line * tiles + index
    size = tl.cast(rows, tl.int64) * tiles
    tl.store(figures + place, maximum)
    tl.store(figures + size + place, tl.sum(tl.exp(exponents), axis=0))
    tl.store(figures + 2 * size + place, peak)
    tl.store(figures + 3 * size + place, best)
    tl.store(tokens + place, tl.min(tl.where(scores == best, ids, vocab - 1), axis=0))
    tl.store(flawed + place, tl.sum((inside & ~finite).to(tl.int32), axis=0))


@triton.jit
def _merge_kernel(
    logits,
    temperatures,
    figures,
    tile_tokens,
    flawed,
    tokens,
    confidences,
    log_probs,
    finite,
    logits_stride,
    tiles,
    rows,
    block: tl.constexpr,
):
    """One line from its tiles."""
    line = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, block)
    inside = index < tiles
    none = float("-inf")
    places = line * tiles + index
    size = tl.cast(rows, tl.int64) * tiles
    maxima = tl.load(figures + places, mask=inside, other=none)
    sums = tl.load(figures + size + places, mask=inside, other=0.0)
    peaks = tl.load(figures + 2 * size + places, mask=inside, other=none)
    scores = tl.load(figures + 3 * size + places, mask=inside, other=none)
    maximum = tl.max(maxima, axis=0)
    maximum = tl.where(maximum > none, maximum, 0.0)
    # At least the maximum's own 1; less only where nothing is finite.
    total = tl.maximum(tl.sum(sums * tl.exp(maxima - maximum), axis=0), 1.0)
    temperature = tl.load(temperatures + line)
    if temperature > 0.0:
        peak = tl.max(peaks, axis=0)
        above = peaks - tl.where(peak > none, peak, 0.0)
        scores += above / tl.maximum(temperature, _LEAST)
    best = tl.max(scores, axis=0)
    winner = tl.min(tl.where(scores == best, index, tiles - 1), axis=0)
    token = tl.load(tile_tokens + line * tiles + winner)
    logit = tl.load(logits + line * logits_stride + token).to(tl.float32)
    log_prob = logit - maximum - tl.log(total)
    flaws = tl.sum(tl.load(flawed + places, mask=inside, other=0), axis=0)
    tl.store(tokens + line, token.to(tl.int64))
    tl.store(confidences + line, tl.exp(log_prob))
    tl.store(log_probs + line, log_prob)
    tl.store(finite + line, flaws == 0)


def predict(
    logits: Tensor, batch: SamplingBatch, draw_scores: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `unmask.predict`. Draws compute noise only on lines whose temperature is above 0."""
    count, vocab = logits.shape
    scores = logits if draw_scores is None else draw_scores
    assert scores.shape == logits.shape
    for matrix in (logits, scores):
        assert matrix.stride(1) == 1
    device = logits.device
    tile = min(_TILE, max(16, triton.next_power_of_2(vocab)))
    tiles = triton.cdiv(vocab, tile)
    figures = torch.empty((4, count, tiles), dtype=torch.float32, device=device)
    tile_tokens, flawed = torch.empty((2, count, tiles), dtype=torch.int32, device=device)
    tokens = torch.empty(count, dtype=torch.int64, device=device)
    confidences, log_probs = torch.empty((2, count), dtype=torch.float32, device=device)
    finite = torch.empty(count, dtype=torch.bool, device=device)
    own = _per_line(batch, count)
    if count:
        _tile_kernel[count, tiles](
            logits,
            scores,
            *own,
            figures,
            tile_tokens,
            flawed,
            logits.stride(0),
            scores.stride(0),
            vocab,
            count,
            draw_scores is not None,
            tile,
            num_warps=4,
        )
        _merge_kernel[count,](
            logits,
            own[0],
            figures,
            tile_tokens,
            flawed,
            tokens,
            confidences,
            log_probs,
            finite,
            logits.stride(0),
            tiles,
            count,
            triton.next_power_of_2(tiles),
            num_warps=1,
        )
    return tokens, confidences, log_probs, finite


def _per_line(batch: SamplingBatch, count: int) -> tuple[Tensor, ...]:
    """In the order of the tile kernel's arguments."""
    own = (
        batch.temperature,
        batch.key,
        batch.position,
        batch.step,
        batch.domain,
        batch.excluded,
        batch.barred,
    )
    for tensor in own:
        assert tensor.shape == (count,)
    return tuple(tensor.contiguous() for tensor in own)
