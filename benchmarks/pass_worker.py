"""Times passes of the towers of one source tree; `benchmarks.passes` runs it, once for each tree.

A line `NAME COUNT` on standard input is answered by a line of JSON: CPU milliseconds a pass.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import twotower
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.engine.denoiser_engine import DenoiserEngine, _DrawWork
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

ROWS, BLOCK, STEPS, PROMPT = 16, 16, 64, 2048
# Contexts of rows are this long, each row's a little longer than the one before.
SHORTEST, LONGER = 300, 13
_GREEDY = Sampler.from_params(GenerationParams(seed=0))


class Passes:
    """Rows with a context in both towers of a checkpoint, and the passes that are timed."""

    def __init__(self, folder: Path) -> None:
        self._context = load_context_tower(folder)
        self._denoiser = DenoiserEngine(load_denoiser_tower(folder))
        self._pass = ContextPass(self._context)
        self._chunk = EngineOptions().prefill_chunk_on("cpu")
        self._draw = torch.Generator().manual_seed(1)
        self._states = self._context.new_states(ROWS, SHORTEST + ROWS * LONGER + 600)
        for row, state in enumerate(self._states):
            self._read(state, SHORTEST + LONGER * row)
        self._kept = [(s.position, s.length, s.conv.clone(), s.ssm.clone()) for s in self._states]
        self.by_name: dict[str, Callable[[int], None]] = {
            "ar, 1 row": lambda count: self._steps(1, count),
            "ar, 16 rows": lambda count: self._steps(ROWS, count),
            "denoiser, 1 row": lambda count: self._blocks(1, count),
            "denoiser, 16 rows": lambda count: self._blocks(ROWS, count),
            "prompt of 2,048": self._prompts,
        }

    def timed(self, name: str, count: int) -> float:
        """CPU milliseconds of one of so many passes, from the same contexts each time."""
        for state, (position, length, conv, ssm) in zip(self._states, self._kept, strict=True):
            state.position, state.length = position, length
            state.conv.copy_(conv)
            state.ssm.copy_(ssm)
        begin = time.thread_time()
        self.by_name[name](count)
        return 1e3 * (time.thread_time() - begin) / count

    def _tokens(self, count: int) -> list[int]:
        vocabulary = self._context.config.vocab_size
        return torch.randint(4, vocabulary, (count,), generator=self._draw).tolist()

    def _read(self, state: object, count: int) -> None:
        tokens = self._tokens(count)
        for start in range(0, count, self._chunk):
            piece = tokens[start : start + self._chunk]
            self._pass.run([ContextWork(state, piece, prefill=True)])

    def _steps(self, rows: int, count: int) -> None:
        for _ in range(count):
            self._pass.run(
                [
                    ContextWork(state, self._tokens(1), draw=Draw(_GREEDY, [state.position + 1]))
                    for state in self._states[:rows]
                ]
            )

    def _blocks(self, rows: int, count: int) -> None:
        mask = self._context.config.mask_token_id
        for _ in range(count):
            works = []
            for state in self._states[:rows]:
                places = [state.position + place for place in range(BLOCK)]
                draw = Draw(_GREEDY, places, excluded_token=mask)
                works.append(_DrawWork(state, self._tokens(BLOCK), 0.5, list(range(BLOCK)), draw))
            self._denoiser._run(works)

    def _prompts(self, count: int) -> None:
        for _ in range(count):
            self._read(self._context.new_state(PROMPT + BLOCK), PROMPT)


def main() -> None:
    """Loads the checkpoint of the first argument and answers until the input ends."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        passes = Passes(Path(sys.argv[1]))
        print(json.dumps({"tree": str(Path(twotower.__file__).parents[1])}), flush=True)
        for line in sys.stdin:
            name, _, count = line.strip().rpartition(" ")
            print(json.dumps(passes.timed(name, int(count))), flush=True)


if __name__ == "__main__":
    main()
