"""The link between towers of one process: a reference, or a copy to the other device."""

from __future__ import annotations

from pathlib import Path

import torch

from twotower.towers.context import ContextTower
from twotower.towers.engine import ContextEngine, DenoiserEngine
from twotower.towers.state import ContextState
from twotower.towers.weights import load_context_tower, load_denoiser_tower


class LocalLink:
    """Hands states to a denoiser engine in the same process and event loop.

    `shared` towers read one copy of a state; otherwise the denoiser's mirrors follow `context`.
    """

    def __init__(self, context: ContextTower, denoiser: DenoiserEngine, shared: bool) -> None:
        self._denoiser = denoiser
        self._shared = shared
        if not shared:
            denoiser.follow(context.replay_tensors())

    async def publish(self, row_id: str, state: ContextState, start: int) -> None:
        """Lets the denoiser read the state itself if shared, else copies what is new of it."""
        if self._shared:
            self._denoiser.adopt(row_id, state)
        else:
            self._denoiser.receive(row_id, state.export(start))


def load_engines(
    folder: Path,
    context_device: str | torch.device,
    denoiser_device: str | torch.device,
    dtype: torch.dtype,
) -> tuple[ContextEngine, DenoiserEngine]:
    """Both towers of a checkpoint as linked engines of this process. Raises CheckpointError."""
    context = ContextEngine(load_context_tower(folder, context_device, dtype))
    denoiser = DenoiserEngine(load_denoiser_tower(folder, denoiser_device, dtype))
    shared = torch.device(context_device) == torch.device(denoiser_device)
    context.link = LocalLink(context.tower, denoiser, shared)
    return context, denoiser
