"""Replay of recorded cases of the reference implementation against this one."""

from __future__ import annotations

from twotower.towers.verify.folder import verify_folder
from twotower.towers.verify.report import CaseReport

__all__ = ["CaseReport", "verify_folder"]
