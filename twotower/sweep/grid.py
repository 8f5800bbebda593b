"""The points of a sweep: each is a name and the parameters in which it differs from the base.

A strategy is a line of STRATEGIES: a mode, what it fixes, and the axes along which it is measured.
A new commit rule or draft source that a request can ask for needs a line there and nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import MODES, Mode
from twotower.towers.request.params import CommitRuleName, GenerationParams, TokenSource

Overrides = dict[str, Any]


@dataclass(frozen=True)
class Strategy:
    """A way to decode in `mode` with `fixed` parameters, measured along `axes`: names of
    parameters, of which the first changes slowest."""

    mode: Mode
    fixed: Mapping[str, Any] = field(default_factory=dict)
    axes: tuple[str, ...] = ()


def _by_rule(rule: CommitRuleName, first: TokenSource) -> Strategy:
    fixed = {"commit_rule": rule, "first_token": first}
    return Strategy("mask_diffusion", fixed, ("block_size", "confidence_threshold"))


# A strategy that has its mode's name belongs to the mode; the others are chosen by name.
STRATEGIES: dict[str, Strategy] = {
    "ar": Strategy("ar"),
    "mock_ar": Strategy("mock_ar"),
    # Drafts from wherever they pay; the next two have one source each, and the two after these
    # check the denoiser's by a mix of both towers.
    "verified": Strategy("verified", axes=("block_size", "draft_steps")),
    "lookup": Strategy("verified", {"draft_source": "lookup"}, ("block_size",)),
    "denoiser": Strategy("verified", {"draft_source": "denoiser"}, ("block_size", "draft_steps")),
    "mix": Strategy("verified", {"acceptance": "mix"}, ("block_size", "mix_ratio")),
    "denoiser_mix": Strategy(
        "verified",
        {"draft_source": "denoiser", "acceptance": "mix"},
        ("block_size", "mix_ratio"),
    ),
    "auto": Strategy("auto", axes=("block_size", "quality")),
    # The service's own rule and first token, and then each rule with its first token.
    "threshold": Strategy("mask_diffusion", axes=("block_size", "confidence_threshold")),
    "released": _by_rule("released", "denoiser"),
    "leftmost": _by_rule("leftmost", "context"),
    "product": _by_rule("product", "context"),
    # No confidence is above 1, so that the number of steps alone decides.
    "steps": Strategy(
        "mask_diffusion", {"confidence_threshold": 1.0}, ("block_size", "steps_per_block")
    ),
    "threshold_steps": Strategy(
        "mask_diffusion", axes=("block_size", "confidence_threshold", "steps_per_block")
    ),
}
CHOICES = tuple(name for name, strategy in STRATEGIES.items() if name != strategy.mode)
# Everything is compared with greedy ar; at a temperature, losses with ar at that temperature.
REFERENCE, AR = "ar greedy", "ar"
_SHORT = {
    "block_size": "block",
    "confidence_threshold": "threshold",
    "steps_per_block": "steps",
    "draft_steps": "drafts",
    "mix_ratio": "mix",
}


@dataclass(frozen=True)
class Point:
    """A point by its name, with the strategy's name and all parameters that the strategy sets."""

    name: str
    strategy: str
    overrides: Overrides

    def params(self, base: GenerationParams) -> GenerationParams:
        """The parameters of its requests."""
        return replace(base, **self.overrides)


@dataclass(frozen=True)
class Grid:
    """The modes, strategies that have no mode's name and values of each axis to be measured."""

    modes: Sequence[str] = ("ar", "mask_diffusion", "verified")
    strategies: Sequence[str] = ("threshold", "steps")
    axes: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for mode in self.modes:
            if mode not in MODES:
                raise InvalidRequestError("modes", mode, f"one of {', '.join(MODES)}")
        for name in self.strategies:
            if name not in CHOICES:
                raise InvalidRequestError("strategy", name, f"one of {', '.join(CHOICES)}")
        for name, values in self.axes.items():
            if not values:
                raise InvalidRequestError(name, [], "at least 1 value")

    def points(self, base: GenerationParams) -> list[Point]:
        """`ar` first, whether it was asked for or not, and every other point once. Raises
        InvalidRequestError for a value that a request may not have."""
        greedy = {"mode": "ar", "temperature": 0.0}
        found = [Point(REFERENCE, "ar", greedy)] if base.temperature else []
        found.append(Point(AR, "ar", {"mode": "ar"}))
        for name, strategy in STRATEGIES.items():
            if name != "ar" and strategy.mode in self.modes and self._is_chosen(name, strategy):
                found += self._along(name, strategy)
        for point in found:
            point.params(base)
        return list({point.name: point for point in found}.values())

    def _is_chosen(self, name: str, strategy: Strategy) -> bool:
        return name == strategy.mode or name in self.strategies

    def _along(self, name: str, strategy: Strategy) -> list[Point]:
        values = [self.axes.get(axis) or [_DEFAULTS[axis]] for axis in strategy.axes]
        return [
            _point(name, strategy, dict(zip(strategy.axes, chosen, strict=True)))
            for chosen in product(*values)
        ]


def shown_value(value: Any) -> str:
    """A value of an axis as it stands in names and labels."""
    return value if isinstance(value, str) else f"{value:g}"


_DEFAULTS = {name: getattr(GenerationParams(), name) for name in GenerationParams.__annotations__}


def _point(name: str, strategy: Strategy, chosen: Overrides) -> Point:
    overrides = {"mode": strategy.mode, **strategy.fixed, **chosen}
    if strategy.mode == "mask_diffusion":
        # With more steps than positions a block ends no later; with fewer, steps would decide
        # where the threshold is meant to.
        block = overrides.get("block_size", _DEFAULTS["block_size"])
        overrides["steps_per_block"] = min(block, overrides.get("steps_per_block", block))
    shown = [f"{_SHORT.get(axis, axis)} {shown_value(overrides[axis])}" for axis in strategy.axes]
    return Point(", ".join([name, *shown]), name, overrides)
