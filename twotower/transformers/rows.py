"""Rows of a call: prompts out of a padded batch, decoding in step, and the padded batch of results.

Every row is decoded as if it were alone. Only a caller that watches the batch as a whole, with
stopping criteria or a streamer, gets the rows in step, one token each at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower.api import Request, TwoTower
from twotower.streams import GenerationStream
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import SEED_BITS, GenerationParams
from twotower.towers.request.token_ids import plain_number

# [B, n] ids so far -> True, or [B] bools, for rows that are to end.
Criteria = Callable[[Tensor, None], Tensor | bool]


@dataclass(frozen=True)
class Batch:
    """A batch of prompts as it was given, [B, T] with its padding, and each row's own ids."""

    input_ids: Tensor
    rows: list[list[int]]

    @classmethod
    def of(cls, input_ids: object, attention_mask: object) -> Batch:
        """Rows are what the mask [B, T] keeps, all if there is none. Raises InvalidRequestError."""
        ids = _matrix("input_ids", input_ids)
        if attention_mask is None:
            return cls(ids, ids.tolist())
        mask = _matrix("attention_mask", attention_mask)
        if mask.shape != ids.shape:
            limit = f"the shape of input_ids, {list(ids.shape)}"
            raise InvalidRequestError("attention_mask", f"shape {list(mask.shape)}", limit)
        kept = mask.to(ids.device).bool()
        return cls(ids, [row[keep].tolist() for row, keep in zip(ids, kept, strict=True)])

    @property
    def width(self) -> int:
        """T, padding included."""
        return int(self.input_ids.shape[1])

    def joined(self, outputs: Sequence[Sequence[int]], pad: int) -> Tensor:
        """Prompts and outputs in one tensor [B, T + N], N the length of the longest output; `pad`
        fills a row after its own end."""
        longest = max(map(len, outputs), default=0)
        filled = [[*output, *[pad] * (longest - len(output))] for output in outputs]
        new = torch.tensor(filled, dtype=self.input_ids.dtype, device=self.input_ids.device)
        return torch.cat([self.input_ids, new.view(len(outputs), longest)], dim=1)


def _matrix(name: str, value: object) -> Tensor:
    """Whole numbers [B, T] with B and T at least 1. Raises InvalidRequestError."""
    limit = "a tensor of whole numbers [B, T]"
    if not isinstance(value, Tensor):
        raise InvalidRequestError(name, value, limit)
    if value.ndim != 2 or not value.numel() or value.is_floating_point() or value.is_complex():
        raise InvalidRequestError(name, f"{value.dtype} of shape {list(value.shape)}", limit)
    return value


@dataclass(frozen=True)
class Decoding:
    """How a batch is decoded: `settings` are arguments of GenerationParams but for seed and EOS.

    Any of the `eos` tokens ends a row, `pad` follows it. Without a `seed` each row draws one from
    torch's generator, so that `torch.manual_seed` makes a call repeatable.
    """

    settings: dict[str, Any]
    eos: tuple[int, ...] = ()
    pad: int = 0
    seed: int | None = None
    criteria: Criteria | None = None
    streamer: Any = None

    def run(self, model: TwoTower, batch: Batch) -> Tensor:
        """Prompts and outputs, [B, T + N]; see `Batch.joined`."""
        if self.criteria is None and self.streamer is None and len(self.eos) < 2:
            requests = [Request(row, self._params()) for row in batch.rows]
            outputs = [result.token_ids for result in model.generate_requests(requests)]
        else:
            outputs = self._run_in_step(model, batch)
        return batch.joined(outputs, self.pad)

    def _run_in_step(self, model: TwoTower, batch: Batch) -> list[list[int]]:
        with ExitStack() as stack:
            streams = []
            for row in batch.rows:
                stream = model.stream(row, **self._arguments())
                stack.callback(stream.close)
                streams.append(stream)
            return self._watch(batch, streams)

    def _watch(self, batch: Batch, streams: Sequence[GenerationStream]) -> list[list[int]]:
        """Takes a token of each row at a time, until all have ended."""
        tokens = [_tokens(stream) for stream in streams]
        outputs: list[list[int]] = [[] for _ in streams]
        live = set(range(len(streams)))
        self._show(batch.input_ids)
        while live:
            new = {row: next(tokens[row], None) for row in sorted(live)}
            ended = {row for row, token in new.items() if token is None or token in self.eos}
            for row, token in new.items():
                outputs[row].extend([] if token is None else [token])
            if any(token is not None for token in new.values()):
                shown = [new.get(row) for row in range(len(streams))]
                self._show(torch.tensor([self.pad if token is None else token for token in shown]))
                ended |= live & self._stopped(batch, outputs)
            for row in ended:
                streams[row].close()
            live -= ended
        if self.streamer is not None:
            self.streamer.end()
        return outputs

    def _stopped(self, batch: Batch, outputs: Sequence[Sequence[int]]) -> set[int]:
        """Rows that the criteria end, seeing prompts and outputs of all rows so far."""
        if self.criteria is None:
            return set()
        sequences = batch.joined(outputs, self.pad)
        answer = torch.as_tensor(self.criteria(sequences, None)).expand(len(sequences))
        return {row for row, stopped in enumerate(answer.tolist()) if stopped}

    def _show(self, token_ids: Tensor) -> None:
        if self.streamer is not None:
            self.streamer.put(token_ids.cpu())

    def _params(self) -> GenerationParams:
        return GenerationParams(**self._arguments())

    def _arguments(self) -> dict[str, Any]:
        """Settings of a row, with its own seed and the release's commit rule. Several EOS tokens
        are looked for here."""
        seed = int(torch.randint(1 << SEED_BITS - 1, ())) if self.seed is None else self.seed
        eos = self.eos[0] if len(self.eos) == 1 else None
        row = {"seed": seed, "eos_token_id": eos}
        return {"commit_rule": "released", **self.settings, **row}


def _tokens(stream: GenerationStream) -> Iterator[int]:
    for block in stream:
        yield from block.token_ids


def token_ids_of(name: str, value: object) -> tuple[int, ...]:
    """One or several token ids as they are given to `generate`: None, a number, a list or a tensor.
    Raises InvalidRequestError."""
    if value is None:
        return ()
    plain = value.tolist() if isinstance(value, Tensor) else plain_number(value)
    ids = plain if isinstance(plain, list | tuple) else [plain]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise InvalidRequestError(name, value, "a token id, or a list of them")
    return tuple(ids)
