"""A service called from Ray Data: `completions` for a pipeline of one's own (extra `batch`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

__all__ = ["completions"]

if TYPE_CHECKING:
    from twotower.data.pipeline import completions


def __getattr__(name: str) -> object:
    """Loads a public name on first use: what only calls a service must not wait for Ray Data."""
    if name not in __all__:
        raise AttributeError(f"module 'twotower.data' has no attribute {name!r}")
    try:
        from twotower.data import pipeline
    except ModuleNotFoundError as error:
        wanted = f"twotower.data: needs {error.name}; pip install 'twotower[batch]'"
        raise ModuleNotFoundError(wanted, name=error.name) from error
    return getattr(pipeline, name)
