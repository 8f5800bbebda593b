"""Training of both towers: the published recipe on two CPU cores in an hour and a half."""

from __future__ import annotations

from twotower.towers.training.options import SHIPPED_CONFIG, TrainingOptions
from twotower.towers.training.pipeline import train

__all__ = ["SHIPPED_CONFIG", "TrainingOptions", "train"]
