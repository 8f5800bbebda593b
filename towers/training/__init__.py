"""Training of the two towers: the published recipe at a scale that anyone can rerun."""

from __future__ import annotations

from twotower.towers.training.options import SHIPPED_CONFIG, TrainingOptions
from twotower.towers.training.pipeline import train

__all__ = ["SHIPPED_CONFIG", "TrainingOptions", "train"]
