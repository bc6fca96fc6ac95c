"""Modes of a posterior, with about the mass of each, as descents find them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.flows.gaussian_mixture import GaussianMixture

_LOOKS = 4  # at Hessians, of modes or not, for each mode that is looked for
_DECREMENT = 0.05  # nats that a mode may lie below where a descent has ended
_SAME = 0.5  # squared standard deviations between what counts as one mode


@dataclass(frozen=True)
class Mode:
    """A minimum of a potential, and its second derivatives there.

    Attributes:
        position: Of shape ``(dimension,)``.
        hessian: Of shape ``(dimension, dimension)``, positive definite.
        value: Of the potential.
    """

    position: Tensor
    hessian: Tensor
    value: float

    @property
    def log_mass(self) -> float:
        """The logarithm of the mass by Laplace's approximation, but for a constant."""
        return -self.value - 0.5 * float(torch.linalg.slogdet(self.hessian).logabsdet)

    def squared_distance(self, position: Tensor) -> Tensor:
        """Of positions ``(*, dimension)``, in standard deviations, of shape ``(*,)``."""
        offset = position - self.position
        return (offset @ self.hessian * offset).sum(-1)

    def log_density(self, position: Tensor) -> Tensor:
        """Laplace's approximation of the posterior, but for a constant, ``(positions,)``."""
        return -self.value - 0.5 * self.squared_distance(position)

    def holds(self, position: Tensor) -> bool:
        """Whether a position is about that of the mode."""
        return float(self.squared_distance(position)) < _SAME


def find_modes(descent: Descent, starts: Tensor, most: int) -> list[Mode]:
    """The modes that descents end in, the highest first.

    Arguments:
        descent: What descends.
        starts: Where descents begin, of shape ``(descents, dimension)``.
        most: How many modes are looked for.
    """
    ends = descent.run(starts)
    modes: list[Mode] = []
    looks = 0
    for index in ends.value.argsort():
        position, gradient = ends.position[index], ends.gradient[index]
        if not ends.value[index].isfinite() or any(mode.holds(position) for mode in modes):
            continue
        looks += 1
        if looks > _LOOKS * most:
            break
        hessian = descent.hessian(position, ends.spread[index])
        root, fault = torch.linalg.cholesky_ex(hessian)
        if int(fault):
            continue
        step = torch.cholesky_solve(gradient[:, None], root)[:, 0]
        if float(gradient @ step) < 2.0 * _DECREMENT:
            modes.append(Mode(position - step, hessian, float(ends.value[index])))
        if len(modes) == most:
            break
    return modes


def beside(known: Sequence[Mode], found: Sequence[Mode]) -> list[Mode]:
    """The modes found that are none of the known ones."""
    return [m for m in found if not any(mode.holds(m.position) for mode in known)]


def mixture_about(modes: Sequence[Mode]) -> GaussianMixture:
    """The modes' Gaussians, each with the same share, which is not trained."""
    hessian = torch.stack([mode.hessian for mode in modes])
    mixture = GaussianMixture(
        hessian.new_zeros(len(modes)),
        torch.stack([mode.position for mode in modes]),
        torch.linalg.cholesky(torch.linalg.inv(hessian)),
    )
    return mixture.requires_grad_(False)
