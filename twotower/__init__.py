"""TwoTower: serving for two-tower block-diffusion language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "AsyncGenerationStream",
    "Block",
    "GenerationParams",
    "GenerationResult",
    "GenerationStream",
    "ProvisionalBlock",
    "Request",
    "TextBlock",
    "TwoTower",
    "Usage",
    "__version__",
]

if TYPE_CHECKING:
    from twotower.api import Request, TwoTower
    from twotower.results import GenerationResult
    from twotower.streams import AsyncGenerationStream, GenerationStream
    from twotower.towers.decoding.services import Block
    from twotower.towers.request.params import GenerationParams
    from twotower.towers.request.results import ProvisionalBlock, TextBlock, Usage

_HOMES = {
    "AsyncGenerationStream": "twotower.streams",
    "Block": "twotower.towers.decoding.services",
    "GenerationParams": "twotower.towers.request.params",
    "GenerationResult": "twotower.results",
    "GenerationStream": "twotower.streams",
    "ProvisionalBlock": "twotower.towers.request.results",
    "Request": "twotower.api",
    "TextBlock": "twotower.towers.request.results",
    "TwoTower": "twotower.api",
    "Usage": "twotower.towers.request.results",
}


def __getattr__(name: str) -> object:
    """Loads a public name on first use: `twotower --help` must not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
