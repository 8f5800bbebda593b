"""Evaluation with EleutherAI's lm-eval: its model class for two-tower models, and the card's tasks.

lm-eval comes with the extra `eval`; of these modules only `lm_eval_model` needs it when imported.
"""

from __future__ import annotations

from importlib.util import find_spec

from twotower.towers.errors import InvalidRequestError

NEEDED = "lm-eval of the extra `eval`: pip install 'twotower[eval]'"


def check_installed() -> None:
    """Raises InvalidRequestError, which names the extra, where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise InvalidRequestError("lm_eval", "no such package", NEEDED)
