"""Programs over rows of different lengths, packed without padding between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from twotower.kernels.rows import Rows
from twotower.towers.engine.cuda_graph import GraphMemory, Program
from twotower.towers.state.tensors import StateTensors


class RaggedProgram(Program):
    """The graphs of passes over up to B rows of at most `longest` tokens each and T tokens in all.

    A call sends every row's `length` beside what `Program` sends. The last of the B + 1 rows of
    `_read_rows` is the padding behind the others' tokens.
    """

    def __init__(
        self,
        pool: StateTensors,
        rows: int,
        tokens: int,
        longest: int,
        memory: GraphMemory,
        inputs: Sequence[str] = (),
        padding: Mapping[str, int] | None = None,
    ) -> None:
        names, width = ("length", *inputs), max(tokens, rows + 1)
        super().__init__(pool, rows + 1, longest, memory, names, width, padding)
        self._starts[-1] = tokens
        self._places = torch.arange(tokens, device=memory.device)

    def _read_rows(self) -> Rows:
        lengths = self._staging["length"][: len(self._slots) - 1]
        self._starts[1:-1].copy_(lengths.cumsum(0))
        return super()._read_rows()

    def _real(self, whole: Tensor) -> Tensor:  # noqa: ARG002
        return self._places < self._starts[-2]
