"""Muon for the matrices inside mixers, AdamW for everything else.

Muon replaces a matrix's momentum by its nearest orthogonal matrix, found with a few Newton-Schulz
iterations (Jordan et al., 2024), so that all directions of a weight move equally fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twotower.kernels.products import fastest_dtype
from twotower.towers.training.parameters import ROUTER_BIAS, Parameters

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_VECTOR_LIKE = ("conv1d.weight", "gate.weight", "t_embedder", "t_block", "scale_shift_tables")


@dataclass(frozen=True)
class OptimizerSettings:
    """Learning rates before the schedule, and constants of Muon and AdamW."""

    muon_rate: float = 0.02
    adam_rate: float = 0.003
    embedding_rate: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.02
    iterations: int = 5
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-10

    def scaled(self, factor: float) -> OptimizerSettings:
        """The same with all three rates times `factor`."""
        return replace(
            self,
            muon_rate=self.muon_rate * factor,
            adam_rate=self.adam_rate * factor,
            embedding_rate=self.embedding_rate * factor,
        )


class Optimizer:
    """Updates fp32 parameters in place; its state is a flat dict of tensors for a checkpoint."""

    def __init__(self, params: Mapping[str, Tensor], settings: OptimizerSettings) -> None:
        self._params = params
        self._settings = settings
        trained = [name for name in params if not name.endswith(ROUTER_BIAS)]
        self._muon = [name for name in trained if is_mixer_matrix(name, params[name])]
        self._adam = [name for name in trained if name not in set(self._muon)]
        self._steps = 0
        self._state = {f"momentum.{name}": torch.zeros_like(params[name]) for name in self._muon}
        for name in self._adam:
            self._state[f"mean.{name}"] = torch.zeros_like(params[name])
            self._state[f"square.{name}"] = torch.zeros_like(params[name])

    @property
    def trained(self) -> list[str]:
        """Names of the parameters that need a gradient."""
        return [*self._muon, *self._adam]

    def state(self) -> Parameters:
        """The state for `restore`, by name; its tensors change with the next step."""
        return {**self._state, "steps": torch.tensor(self._steps)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Copies a state that `state` returned. Raises KeyError if a tensor is missing."""
        self._steps = int(state["steps"])
        for name, value in self._state.items():
            value.copy_(state[name])

    @torch.no_grad()
    def step(self, grads: Mapping[str, Tensor], schedule: float) -> None:
        """One update; `schedule` in [0, 1] scales every rate."""
        self._steps += 1
        self._muon_step(grads, self._settings.muon_rate * schedule)
        self._adam_step(grads, schedule)

    def _muon_step(self, grads: Mapping[str, Tensor], rate: float) -> None:
        settings = self._settings
        groups: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for name in self._muon:
            momentum = self._state[f"momentum.{name}"]
            momentum.lerp_(grads[name], 1 - settings.momentum)
            ahead = grads[name].lerp(momentum, settings.momentum)
            groups.setdefault(tuple(ahead.shape[-2:]), []).append((name, ahead))
        for (rows, cols), members in groups.items():
            scale = rate * max(1.0, rows / cols) ** 0.5
            for (name, _), update in zip(members, _orthogonal(members, settings), strict=True):
                param = self._params[name]
                param.mul_(1 - rate * settings.weight_decay)
                param.add_(update.to(param.dtype).view_as(param), alpha=-scale)

    def _adam_step(self, grads: Mapping[str, Tensor], schedule: float) -> None:
        settings = self._settings
        first, second = settings.betas
        unbias = (1 - second**self._steps) ** 0.5 / (1 - first**self._steps)
        for name in self._adam:
            grad = grads[name]
            mean, square = self._state[f"mean.{name}"], self._state[f"square.{name}"]
            mean.lerp_(grad, 1 - first)
            square.mul_(second).addcmul_(grad, grad, value=1 - second)
            embedding = name.endswith("embeddings.weight")
            rate = settings.embedding_rate if embedding else settings.adam_rate
            self._params[name].addcdiv_(
                mean, square.sqrt().add_(settings.epsilon), value=-rate * schedule * unbias
            )


def is_mixer_matrix(name: str, value: Tensor) -> bool:
    """True if Muon updates the parameter: a matrix, or a stack of experts, inside a mixer."""
    return ".mixer." in name and value.ndim >= 2 and not any(part in name for part in _VECTOR_LIKE)


def _orthogonal(
    members: Sequence[tuple[str, Tensor]], settings: OptimizerSettings
) -> Sequence[Tensor]:
    """Orthogonalised updates [n_i, rows, cols] of (name, update [.., rows, cols]) pairs of one
    shape, computed as one batch."""
    counts = [update[..., 0, 0].numel() for _, update in members]
    stacked = torch.cat([update.reshape(-1, *update.shape[-2:]) for _, update in members])
    return torch.split(newton_schulz(stacked, settings.iterations), counts)


def newton_schulz(matrices: Tensor, iterations: int) -> Tensor:
    """[B, rows, cols] with singular values near 1 and the singular vectors of `matrices`.

    bf16 is precise enough and is used where it is fast.
    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    a, b, c = _NEWTON_SCHULZ
    x: Tensor
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = (matrices.mT if tall else matrices).to(fastest_dtype())
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(x.dtype)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x
