"""Times of the operators of a pass.

Operators are timed inside a real pass, so that weights and states come from memory as in a service.
On a GPU the device is kept busy until the host is far ahead, so that a time includes no launch; it
still includes the cost of two events, about a microsecond a call.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from twotower.bench.timing import Stopwatch, synchronize
from twotower.kernels import dispatch
from twotower.kernels.dispatch import Operator
from twotower.planner.floors import Ceilings, Work
from twotower.towers.model.weights import TowerWeights

_SCAN_AND_REPLAY = "mamba_scan and replay"
# The operators of the floor that each measured operator computes. The shared expert belongs to
# `slot_outputs` where it is computed with the routed experts, otherwise to `mlp`.
_FLOOR_OF: dict[str, tuple[str, ...]] = {
    "add_norm": ("norm",),
    "mamba_scan": ("scan",),
    _SCAN_AND_REPLAY: ("scan",),
    "attention": ("attention",),
    "route": ("router",),
    "slot_outputs": ("experts_up", "experts_down"),
    "mlp": ("mlp_up", "mlp_down"),
    "in_proj": ("in_proj",),
    "out_proj": ("out_proj",),
    "qkv": ("qkv",),
    "o_proj": ("o_proj",),
    "head": ("head",),
}
_SHARED = ("shared_up", "shared_down")
_REPEATS = 5
_HOLD_SIDE = 8192
_LONG_HOLD, _SHORT_HOLD = 32, 2


@dataclass(frozen=True)
class OperatorTime:
    """All calls of an operator in a pass: their seconds, and their floor in seconds (None: the
    floor does not have the operator)."""

    name: str
    calls: int
    seconds: float
    floor_seconds: float | None


class OperatorClock:
    """While active, times every call of an operator; calls inside of a call belong to the outer
    operator. Matrix products are named by their weight."""

    def __init__(self, device: torch.device, weights: TowerWeights) -> None:
        self._device = device
        self._watch = Stopwatch(device)
        self._hold = _Hold(device)
        self._calls: list[tuple[str, int, int]] = []
        self._operators = {
            id(value): name for name, value in vars(dispatch).items() if isinstance(value, Operator)
        }
        self._weights = _names_of(weights)
        self._inside = False
        self._plain_call = Operator.__call__

    def __enter__(self) -> OperatorClock:
        clock = self

        def timed(operator: Operator[..., Any], *args: Any, **kwargs: Any) -> Any:
            return clock._time(operator, args, kwargs)

        Operator.__call__ = timed  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        Operator.__call__ = self._plain_call  # type: ignore[method-assign]

    def totals(self) -> dict[str, tuple[int, float]]:
        """Calls and seconds by operator, in the order of their first calls."""
        synchronize(self._device)
        totals: dict[str, tuple[int, float]] = {}
        for name, begin, end in self._calls:
            calls, seconds = totals.get(name, (0, 0.0))
            totals[name] = (calls + 1, seconds + self._watch.seconds(begin, end))
        return totals

    def _time(self, operator: Operator[..., Any], args: Any, kwargs: Any) -> Any:
        if self._inside:
            return self._plain_call(operator, *args, **kwargs)
        name = self._name_of(operator, args)
        if all(name != known for known, _, _ in self._calls):
            # Before an operator's first call the host may have waited for the device.
            self._hold.occupy(_SHORT_HOLD if self._calls else _LONG_HOLD)
        self._inside = True
        begin = self._watch.mark()
        try:
            return self._plain_call(operator, *args, **kwargs)
        finally:
            self._calls.append((name, begin, self._watch.mark()))
            self._inside = False

    def _name_of(self, operator: Operator[..., Any], args: Sequence[Any]) -> str:
        name = self._operators[id(operator)]
        if name != "linear":
            return name
        return self._weights.get(args[1].data_ptr(), name)


def measure_operators(
    work: Callable[[], object],
    weights: TowerWeights,
    device: torch.device,
    floor: Sequence[Work],
    ceilings: Ceilings,
) -> list[OperatorTime]:
    """Median times of the operators of the pass `work`, and their floors."""
    work()
    rounds = []
    for _ in range(_REPEATS):
        with OperatorClock(device, weights) as clock:
            work()
        rounds.append(_joined(clock.totals()))
    floors = _floors_by_operator(rounds[0], floor, ceilings)
    return [
        OperatorTime(
            name, calls, statistics.median(each[name][1] for each in rounds), floors.get(name)
        )
        for name, (calls, _) in rounds[0].items()
    ]


def _floors_by_operator(
    measured: Mapping[str, tuple[int, float]], floor: Sequence[Work], ceilings: Ceilings
) -> dict[str, float]:
    """Seconds of the floor by measured operator, without operators that the floor does not have."""
    works = {work.name: work for work in floor}
    parts = {name: _FLOOR_OF[name] for name in measured if name in _FLOOR_OF}
    dense = works["mlp_up"].launches if "mlp_up" in works else 0
    if measured.get("mlp", (0, 0.0))[0] > dense:
        parts["mlp"] += _SHARED
    elif "slot_outputs" in parts:
        parts["slot_outputs"] += _SHARED
    return {
        name: sum(works[part].seconds(ceilings) for part in names if part in works)
        for name, names in parts.items()
    }


def _joined(totals: dict[str, tuple[int, float]]) -> dict[str, tuple[int, float]]:
    """The totals with scan and replay added up if there is a replay: the floor's scan includes
    writing the state, which is the replay's work then."""
    if not {"mamba_scan", "replay"} <= totals.keys():
        return totals
    (scans, scan), (replays, replay) = totals["mamba_scan"], totals["replay"]
    rest = {name: total for name, total in totals.items() if name not in ("mamba_scan", "replay")}
    return {**rest, _SCAN_AND_REPLAY: (scans + replays, scan + replay)}


def _names_of(weights: TowerWeights) -> dict[int, str]:
    """Names of the matrices by the addresses of their data."""
    names = {weights.head.data_ptr(): "head"}
    for layer in weights.layers:
        for field in dataclasses.fields(layer.mixer):
            value = getattr(layer.mixer, field.name)
            if isinstance(value, Tensor) and value.layout == torch.strided:
                names[value.data_ptr()] = field.name
    return names


class _Hold:
    """Keeps a GPU busy with products, so that the host can queue launches ahead; does nothing on a
    CPU."""

    def __init__(self, device: torch.device) -> None:
        self._pair: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda":
            left = torch.randn(_HOLD_SIDE, _HOLD_SIDE, device=device, dtype=torch.bfloat16)
            self._pair = (left, torch.empty_like(left))

    def occupy(self, products: int) -> None:
        """Queues so many products, 1 to 2 ms each."""
        if self._pair is not None:
            for _ in range(products):
                torch.mm(self._pair[0], self._pair[0], out=self._pair[1])
