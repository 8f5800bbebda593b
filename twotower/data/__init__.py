"""A service called from Ray Data: `completions` for a pipeline of one's own (extra `batch`)."""

from twotower.data.pipeline import completions

__all__ = ["completions"]
