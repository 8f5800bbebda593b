"""The denoiser's likelihood of a continuation: a lower bound, by block, from masked passes.

A continuation y after a context c is cut into blocks of S tokens from its start, as decoding cuts
it. Blocks follow each other autoregressively (Arriola et al. 2025, "Block Diffusion", section 3),
each after the context tower's state of c and of all clean blocks before it:

    log p(y | c) = sum over blocks b of log p(y_b | c, y_<b)

Within a block of L scored tokens the estimator is that of Nie et al. 2025 ("Large Language
Diffusion Models", section on likelihood evaluation; Ou et al. 2024 show that it equals the chain
rule in random order):

    log p(y_b | c, y_<b) >= E over l, M of (L / l) sum over i in M of log p(y_i | y_b without M)

with l uniform on 1..L and M uniform among the sets of l of the L positions. In words: the mean over
all orders of the log-probability of writing the block one token at a time in that order. By
Jensen's inequality that is at most the log of the mean over orders, which is the probability of the
block where the order is drawn. It bounds neither the probability of a greedy output, nor that of
steps that commit several tokens at once.

The last block may have L < S scored tokens; the rest of it stays masked, as decoding sees it. The
denoiser's time is the masked share of the whole block, and its softmax leaves out the mask token.

Where all 2^L - 1 sets are no more than `samples` they are all computed and the expectation is
exact. Otherwise there are `samples` sets, whose numbers l are spread evenly over 1..L from a random
start (each l is uniform, so the mean stays without bias) and whose positions are drawn. Draws are
keyed by the tokens before the block, the position, the sample and `seed`, so that a row gets in a
batch what it gets alone, and continuations of one context share their masks.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import torch
from torch import Tensor

from twotower.evaluation.backend import Likelihood, Pair
from twotower.kernels.philox import uniforms
from twotower.towers.engine.options import EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.number_checks import check_whole
from twotower.towers.request.params import MAX_BLOCK_SIZE
from twotower.towers.state.context_state import ContextState

DOMAIN_LIKELIHOOD = 3
MAX_SAMPLES = 65536


@dataclass(frozen=True)
class Mask:
    """Masked offsets of a block, and the weight of the sum of their log-probabilities."""

    offsets: tuple[int, ...]
    weight: float


def masks_of(length: int, samples: int, key: int, position: int) -> list[Mask]:
    """The masks over `length` tokens: all of them if they are no more than `samples`."""
    if 2**length - 1 <= samples:
        return every_mask(length)
    return drawn_masks(length, samples, key, position)


def every_mask(length: int) -> list[Mask]:
    """All masks of at least one token; their weighted sums add up to the expectation."""
    return [
        Mask(offsets, 1.0 / (count * math.comb(length, count)))
        for count in range(1, length + 1)
        for offsets in combinations(range(length), count)
    ]


def drawn_masks(length: int, samples: int, key: int, position: int) -> list[Mask]:
    """`samples` masks over the `length` tokens from `position` on; `key` has 64 bits."""
    where = torch.tensor([position])
    first = int(float(uniforms(key, where, samples, DOMAIN_LIKELIHOOD, 1)) * length)
    positions = torch.arange(position, position + length)
    masks = []
    for sample in range(samples):
        count = (first + sample * length // samples) % length + 1
        order = uniforms(key, positions, sample, DOMAIN_LIKELIHOOD, 1).flatten().argsort()
        offsets = tuple(sorted(order[:count].tolist()))
        masks.append(Mask(offsets, length / count / samples))
    return masks


def block_key(seed: int, before: Sequence[int]) -> int:
    """The 64-bit key of a block's draws, from the tokens before it."""
    text = f"{seed}/{' '.join(map(str, before))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class _Work:
    """A pass over a block of row number `row`: its draft and time, the masked offsets that count
    and their true tokens."""

    row: int
    state: ContextState
    draft: Sequence[int]
    timestep: float
    mask: Mask
    targets: Sequence[int]


@dataclass
class _Total:
    """What has been found of a row."""

    parts: list[float] = field(default_factory=list)
    is_greedy: bool = True
    nfe: int = 0


class DenoiserLikelihood:
    """Bounds of many rows in shared passes. Both towers stand on one device. Raises
    InvalidRequestError for numbers out of their limits."""

    def __init__(
        self,
        context: ContextTower,
        denoiser: DenoiserTower,
        *,
        samples: int = 32,
        block_size: int = 16,
        seed: int = 0,
    ) -> None:
        check_whole("samples", samples, 1, MAX_SAMPLES)
        check_whole("block_size", block_size, 1, MAX_BLOCK_SIZE)
        self._context = context
        self._denoiser = denoiser
        self._samples = samples
        self._block_size = block_size
        self._seed = seed
        limits = EngineOptions().pass_limits(denoiser.device.type)
        self._rows_per_pass = max(1, limits.max_num_batched_tokens // block_size)
        self._chunk = EngineOptions().prefill_chunk_on(context.device.type)

    @torch.inference_mode()
    def bounds(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """The bound of each pair's continuation, in nats; the states of all are held at once.

        `is_greedy` says that in every mask every masked token was the most probable one.
        """
        if not pairs:
            return []
        capacity = max(len(pair.context) + len(pair.continuation) for pair in pairs)
        states = self._context.new_states(len(pairs), capacity)
        totals = [_Total() for _ in pairs]
        for pair, state in zip(pairs, states, strict=True):
            self._read(pair.context, state)
        longest = max(len(pair.continuation) for pair in pairs)
        for start in range(0, longest, self._block_size):
            works = [
                work
                for row, pair in enumerate(pairs)
                for work in self._works(row, pair, start, states[row])
            ]
            for at in range(0, len(works), self._rows_per_pass):
                self._pass(works[at : at + self._rows_per_pass], totals)
            stop = start + self._block_size
            for pair, state in zip(pairs, states, strict=True):
                if len(pair.continuation) > stop:
                    self._read(pair.continuation[start:stop], state)
        return [Likelihood(math.fsum(one.parts), one.is_greedy, one.nfe) for one in totals]

    def _read(self, token_ids: Sequence[int], state: ContextState) -> None:
        for start in range(0, len(token_ids), self._chunk):
            piece = token_ids[start : start + self._chunk]
            self._context.forward([piece], [state])
            self._context.advance(state, len(piece))

    def _works(self, row: int, pair: Pair, start: int, state: ContextState) -> Iterator[_Work]:
        """The passes over the block of a row that starts at `start` of its continuation."""
        block = list(pair.continuation[start : start + self._block_size])
        if not block:
            return
        before = [*pair.context, *pair.continuation[:start]]
        mask_token, rest = self._denoiser.config.mask_token_id, self._block_size - len(block)
        key = block_key(self._seed, before)
        for mask in masks_of(len(block), self._samples, key, len(before)):
            hidden = set(mask.offsets)
            shown = [mask_token if at in hidden else token for at, token in enumerate(block)]
            timestep = (len(hidden) + rest) / self._block_size
            targets = [block[offset] for offset in mask.offsets]
            yield _Work(row, state, shown + [mask_token] * rest, timestep, mask, targets)

    def _pass(self, works: Sequence[_Work], totals: Sequence[_Total]) -> None:
        """A denoiser pass over many drafts, added to their rows' totals."""
        hidden = self._denoiser.forward(
            [work.draft for work in works],
            [work.timestep for work in works],
            [work.state for work in works],
        )
        lines = [
            index * self._block_size + offset
            for index, work in enumerate(works)
            for offset in work.mask.offsets
        ]
        logits = self._denoiser.logits(hidden[lines]).float()
        logits[:, self._denoiser.config.mask_token_id] = float("-inf")
        found = _found(logits, [target for work in works for target in work.targets])
        for work in works:
            pieces = [next(found) for _ in work.targets]
            total = totals[work.row]
            total.parts.append(work.mask.weight * math.fsum(value for value, _ in pieces))
            total.is_greedy = total.is_greedy and all(best for _, best in pieces)
            total.nfe += 1


def _found(logits: Tensor, targets: Sequence[int]) -> Iterator[tuple[float, bool]]:
    """The log-probability of each line's target, and whether nothing is more probable."""
    chosen = torch.tensor(targets, device=logits.device).unsqueeze(1)
    value = logits.gather(1, chosen).squeeze(1)
    log_probs = (value - torch.logsumexp(logits, -1)).tolist()
    return zip(log_probs, (value >= logits.amax(-1)).tolist(), strict=True)
