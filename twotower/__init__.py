"""TwoTower: serving for two-tower block-diffusion language models."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = [
    "Block",
    "GenerationParams",
    "GenerationResult",
    "Request",
    "TwoTower",
    "__version__",
]

if TYPE_CHECKING:
    from twotower.api import GenerationResult, Request, TwoTower
    from twotower.towers.decoding.services import Block
    from twotower.towers.request.params import GenerationParams

_HOMES = {
    "Block": "twotower.towers.decoding.services",
    "GenerationParams": "twotower.towers.request.params",
    "GenerationResult": "twotower.api",
    "Request": "twotower.api",
    "TwoTower": "twotower.api",
}


def __getattr__(name: str) -> object:
    """Loads a public name on first use: `twotower --help` must not wait for torch."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'twotower' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
