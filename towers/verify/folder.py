"""Replay of all recorded cases in a folder, against its checkpoint on a device.

A folder holds a checkpoint, `golden.safetensors` and `manifest.json`. Token ids, traces and the
number of denoiser calls must be equal, floats within the tolerances of `report`. Where a recorded
batch was coupled through a shared timestep, results of the rows by themselves are compared instead.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from twotower.towers.checkpoint.weights import (
    load_context_tower,
    load_denoiser_tower,
    parse_device,
    parse_dtype,
)
from twotower.towers.errors import CheckpointError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.verify.generations import (
    replay_autoregressive,
    replay_loop,
    replay_mask_diffusion,
)
from twotower.towers.verify.report import Case, CaseReport, Recorded
from twotower.towers.verify.single_passes import (
    replay_denoise,
    replay_extend,
    replay_prefill,
    replay_score,
)

_REPLAYS: dict[str, Callable[[ContextTower, DenoiserTower, Case, Recorded, CaseReport], None]] = {
    "prefill": replay_prefill,
    "extend": replay_extend,
    "denoise": replay_denoise,
    "mask_diffusion": replay_mask_diffusion,
    "ar": replay_autoregressive,
    "mock_ar": replay_autoregressive,
    "score": replay_score,
    "loop": replay_loop,
}


def verify_folder(
    folder: Path,
    device: str = "cpu",
    dtype: str = "float32",
    report: Callable[[str], None] = print,
    kinds: Sequence[str] = (),
    progress: Callable[[int, int, str], None] | None = None,
) -> bool:
    """Replays every case of `folder`, reports a line for each and a summary; True if all hold.

    `kinds` are those of cases to replay, all if none is given. `progress` gets, before each case,
    the number of those done, of all, and its id. Raises CheckpointError
    if the folder has no readable cases or its checkpoint is wrong.
    """
    target = parse_device(device)
    cases, tensors = _read_cases(folder)
    cases = [case for case in cases if not kinds or case["kind"] in kinds]
    context = load_context_tower(folder, target, parse_dtype(dtype))
    denoiser = load_denoiser_tower(folder, target, parse_dtype(dtype))
    missed = 0
    for index, case in enumerate(cases):
        if progress is not None:
            progress(index, len(cases), str(case["id"]))
        prefix = f"{case['id']}/"
        recorded = {
            name.removeprefix(prefix): value
            for name, value in tensors.items()
            if name.startswith(prefix)
        }
        result = CaseReport(case["id"], case["kind"])
        if case["kind"] in _REPLAYS:
            _REPLAYS[case["kind"]](context, denoiser, case, recorded, result)
        else:
            result.misses.append(f"kind {case['kind']!r} is unknown")
        missed += bool(result.misses)
        report(result.line())
    report(f"{len(cases) - missed} of {len(cases)} cases hold ({folder.name}, {device}, {dtype})")
    return missed == 0


def _read_cases(folder: Path) -> tuple[list[Case], dict[str, Tensor]]:
    """The manifest's cases, and their tensors under `id/name`; raises CheckpointError."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        cases = manifest["cases"]
        tensors = load_file(folder / manifest.get("tensor_file", "golden.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CheckpointError(
            f"{folder}: no readable manifest.json and golden.safetensors ({error})"
        ) from None
    if not cases:
        raise CheckpointError(f"{folder}: manifest.json lists no cases")
    return cases, tensors
