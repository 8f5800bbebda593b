"""Both towers in this process, to compare a service with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower import TwoTower
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.load import load_engines
from twotower.towers.engine.options import EngineOptions
from twotower.towers.text.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Local:
    """A model on the CPU in fp32, with its engines."""

    model: TwoTower
    context: ContextEngine
    denoiser: DenoiserEngine

    def stats(self) -> dict[str, dict[str, float]]:
        """Counters of each tower, by tower."""
        return {
            "context": self.context.stats().report(),
            "denoiser": self.denoiser.stats().report(),
        }

    def count_passes_alike(self) -> None:
        """Makes every pass cost the same in the eyes of who chooses drafts, whatever its tokens:
        as on a device where a pass is bound by its weights. To be called before the first pass."""
        self.context.pass_times.fixed = self.model.draft_times.fixed = True


def load_local(
    path: str | None,
    rows: int,
    max_context: int,
    *,
    threaded: bool = False,
    prefill_chunk: int | None = None,
) -> Local:
    """Loads a checkpoint (None: the shipped model) without a prefix cache, so that the second run
    of a prompt costs as much as the first. `threaded` gives each tower a thread."""
    folder = resolve_checkpoint(path)
    options = EngineOptions(
        max_num_seqs=rows,
        max_context=max_context,
        prefix_cache_mib=0,
        prefill_chunk=prefill_chunk,
    )
    context, denoiser = load_engines(
        folder, "cpu", "cpu", torch.float32, options=options, threaded=threaded
    )
    return Local(TwoTower(context, denoiser, load_tokenizer(folder)), context, denoiser)
