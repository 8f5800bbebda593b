"""Both towers of a checkpoint as linked engines of this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from twotower.kernels.quantized import ExpertProducts
from twotower.towers.checkpoint.checkpoint import ReadProgress
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.unmasking import CommitRule
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.turns import turns_of
from twotower.towers.request.params import GenerationParams


def load_engines(
    folder: Path,
    context_device: str | torch.device,
    denoiser_device: str | torch.device,
    dtype: torch.dtype,
    *,
    options: EngineOptions | None = None,
    deterministic: bool = False,
    threaded: bool = False,
    rule: Callable[[GenerationParams], CommitRule] | None = None,
    progress: ReadProgress | None = None,
    expert_products: ExpertProducts = "widened",
) -> tuple[ContextEngine, DenoiserEngine]:
    """Both towers of a checkpoint as linked engines of this process.

    On one device they share one copy of every row's state. `deterministic` is that of both.
    `progress` gets the bytes read so far, and those of both towers in their files, after each
    tensor. Raises CheckpointError, and ConfigError if the states have no room, or for
    `expert_products` "fp8" of experts that are not in 8 bits.
    """
    chosen = options or EngineOptions()
    first, second = (None, None) if progress is None else _halves(progress)
    context_tower = load_context_tower(
        folder,
        context_device,
        dtype,
        deterministic=deterministic,
        progress=first,
        expert_products=expert_products,
    )
    denoiser_tower = load_denoiser_tower(
        folder,
        denoiser_device,
        dtype,
        deterministic=deterministic,
        progress=second,
        expert_products=expert_products,
    )
    shared = torch.device(context_device) == torch.device(denoiser_device)
    turns = turns_of(context_tower.device, shared=shared, threaded=threaded)
    denoiser = DenoiserEngine(
        denoiser_tower,
        chosen,
        pool=None if shared else chosen.pool_for(denoiser_tower),
        rule=rule,
        threaded=threaded,
        turn=turns.denoiser if turns else None,
    )
    link = LocalLink(context_tower, denoiser, shared)
    readers = [denoiser_tower] if shared else []
    pool = chosen.pool_for(context_tower, *readers, mirrored=not shared)
    context = ContextEngine(
        context_tower,
        link,
        chosen,
        pool=pool,
        threaded=threaded,
        turn=turns.context if turns else None,
    )
    return context, denoiser


def _halves(progress: ReadProgress) -> tuple[ReadProgress, ReadProgress]:
    """What the two towers tell one after the other, as one progress. The second is taken for as
    large as the first until it says its size."""
    before = 0

    def first(done: int, total: int) -> None:
        nonlocal before
        before = total
        progress(done, 2 * total)

    def second(done: int, total: int) -> None:
        progress(before + done, before + total)

    return first, second
