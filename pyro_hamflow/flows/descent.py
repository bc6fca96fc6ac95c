"""Descents of a potential to its minima, all at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import Program

_STEPS = 100  # of each descent
_ENDED = 1e-3  # nats that a step promises, below which a descent is over
_STRAY = 0.05  # of the descents, that others do not wait for
_RADIUS = 1.0  # the first, in units of the scale
_LONGER, _SHORTER = 2.0, 0.3  # a radius after a step that led downwards, and one that did not
_LEAST_CURVATURE = 1e-10  # of a pair of steps, that the inverse Hessian learns from


class Ends(NamedTuple):
    """Where descents have ended.

    Attributes:
        position: Of shape ``(descents, dimension)``.
        value: Of the potential, of shape ``(descents,)``.
        gradient: Of shape ``(descents, dimension)``.
        spread: Standard deviations of a Gaussian of the curvature met on the way, likewise.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    spread: Tensor


class Descent:
    """Quasi-Newton descents within radii that grow and shrink, noise held.

    Arguments:
        potential: What to descend.
        scale: The length of a step in each coordinate, of shape ``(dimension,)``.
        noise: Of shape ``(1, noise_dimension)``.
        machine: Value and gradient of any number of positions by machine code, where there is any.
    """

    def __init__(
        self, potential: Potential, scale: Tensor, noise: Tensor, machine: Program | None = None
    ) -> None:
        self.potential, self.noise, self._machine = potential, noise, machine
        self.scale = scale.clamp(min=torch.finfo(scale.dtype).eps)

    def value_and_gradient(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Potentials, infinite where they are no number, and gradients, zero there."""
        noise = self.noise.expand(len(position), -1)
        value, gradient, *_ = self._program(position)(position, noise)
        good = value.isfinite() & gradient.isfinite().all(-1)
        value, gradient = value.to(position), gradient.to(position)
        return torch.where(good, value, torch.inf), torch.where(good[:, None], gradient, 0.0)

    def value(self, position: Tensor, noise: Tensor) -> Tensor:
        """Potentials, whatever they are, of other noise."""
        return self._program(position)(position, noise)[0].to(position)

    def _program(self, position: Tensor) -> Program:
        return self._machine or self.potential.programs.program("gradient", len(position))

    def run(self, position: Tensor) -> Ends:
        """Where descents from positions ``(descents, dimension)`` end."""
        value, gradient = self.value_and_gradient(position)
        count, dimension = position.shape
        inverse = torch.eye(dimension).to(position).repeat(count, 1, 1)  # Hessians, in units
        radius = position.new_full((count, 1), _RADIUS)
        for _ in range(_STEPS):
            slope = gradient * self.scale
            step = -(inverse @ slope[..., None])[..., 0]
            length = step.abs().amax(-1, keepdim=True)
            step = step * (radius / length.clamp(min=1e-30)).clamp(max=1.0)
            going = -(slope * step).sum(-1) > _ENDED
            if going.double().mean() < _STRAY:
                break
            there = position + step * self.scale
            new_value, new_gradient = self.value_and_gradient(there)
            better = (new_value < value)[:, None]
            known = new_value.isfinite()[:, None]
            taken = length.minimum(radius)
            radius = torch.where(better, radius.maximum(_LONGER * taken), _SHORTER * taken)
            change = torch.where(known, (new_gradient - gradient) * self.scale, 0.0)
            inverse = _updated(inverse, step, change)
            position = torch.where(better, there, position)
            gradient = torch.where(better, new_gradient, gradient)
            value = torch.where(better[:, 0], new_value, value)
        spread = inverse.diagonal(dim1=-2, dim2=-1).clamp(min=0.0).sqrt() * self.scale
        return Ends(position, value, gradient, spread)

    def hessian(self, position: Tensor, spread: Tensor) -> Tensor:
        """Second derivatives at one position, from differences of the gradient.

        Arguments:
            position: Where, of shape ``(dimension,)``.
            spread: The length in each coordinate over which they may change, likewise.
        """
        precision = torch.finfo(position.dtype).eps
        step = precision ** (1 / 3) * spread.minimum(self.scale).maximum(precision * self.scale)
        moves = torch.diag(step)
        _, above = self.value_and_gradient(position + moves)
        _, below = self.value_and_gradient(position - moves)
        hessian = (above - below) / (2.0 * step[:, None])
        return 0.5 * (hessian + hessian.mT)


def _updated(inverse: Tensor, step: Tensor, change: Tensor) -> Tensor:
    """The inverse Hessians of Broyden, Fletcher, Goldfarb and Shanno, where curvature is upwards.

    Arguments:
        inverse: As they are, of shape ``(descents, dimension, dimension)``.
        step: Of the last steps, of shape ``(descents, dimension)``.
        change: Of the gradient along them, of the same shape.
    """
    curvature = (step * change).sum(-1)
    size = step.square().sum(-1).sqrt() * change.square().sum(-1).sqrt()
    good = curvature > _LEAST_CURVATURE * size
    rate = torch.where(good, 1.0 / curvature.where(good, 1.0), 0.0)[:, None]
    along = (inverse @ change[..., None])[..., 0]
    weight = rate * (1.0 + rate * (change * along).sum(-1, keepdim=True))
    other = 0.5 * weight * step - rate * along  # nothing where curvature is not upwards
    return torch.baddbmm(inverse, torch.stack([step, other], -1), torch.stack([other, step], -2))
