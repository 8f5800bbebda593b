"""Replay of recorded cases of the reference implementation against this one, and the self-test of
a device."""

from __future__ import annotations

from twotower.towers.verify.folder import verify_folder
from twotower.towers.verify.on_device import prove_device, self_test
from twotower.towers.verify.report import CaseReport

__all__ = ["CaseReport", "prove_device", "self_test", "verify_folder"]
