"""A path's log joint density to second order about a place, from which Newton's steps are made."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pyro_hamflow.programs import banded


class PathMap(Protocol):
    """From standard normal noise to a Gaussian path."""

    def draw(self, noise: Tensor, /) -> Tensor:
        """The path that noise of shape ``(*group.shape, n)`` makes."""

    def pulled(self, direction: Tensor, /) -> Tensor:
        """The direction of the noise that moves the path in one the furthest."""


class PathLook(Protocol):
    """The log joint density of a path to second order, the curvature of the likelihood clamped."""

    @property
    def value(self) -> Tensor:
        """It itself but for a constant, of shape ``(*group.shape)``."""

    @property
    def slope(self) -> Tensor:
        """Its gradient, ``(*group.shape, n)``."""

    def step(self, damping: Tensor, /) -> Tensor:
        """Newton's step, ``(*group.shape, n)``.

        Arguments:
            damping: How much of its own size is added to the curvature, ``(*group.shape)``.
        """

    def deviations(self) -> Tensor:
        """The standard deviations of the Gaussian of this curvature, ``(*group.shape, n)``."""

    def mass(self) -> Tensor:
        """The logarithm of that Gaussian's integral but for a constant, ``(*group.shape)``."""

    def gaussian(self, place: Tensor, /) -> PathMap:
        """That Gaussian, seen from the place that was looked at."""

    def is_finite(self) -> Tensor:
        """Where something is known to second order, ``(*group.shape)``."""

    def chosen(self, other: Self, better: Tensor, /) -> Self:
        """Another look's elements where that is better, ``(*group.shape)``, else these."""


LookFrom = Callable[[Tensor], PathLook]  # from a path
LookAt = Callable[[dict[str, Tensor]], LookFrom]  # for values of the parameters


class PathGaussian(NamedTuple):
    """A Gaussian path by its precision.

    Attributes:
        place: Where the density was expanded.
        forward: The root's solution of the gradient there.
        root: The root of the precision.
    """

    place: Tensor
    forward: Tensor
    root: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """The path that noise of shape ``(*group.shape, n)`` makes."""
        return self.place + banded.solve(self.root, self.forward + noise, transposed=True)

    def pulled(self, direction: Tensor) -> Tensor:
        """The direction of the noise that moves the path in one the furthest."""
        return banded.solve(self.root, direction)


class Look(NamedTuple):
    """A look by the precision.

    Attributes:
        value: The log joint density.
        slope: Its gradient.
        precision: The lower bands of minus its Hessian.
    """

    value: Tensor
    slope: Tensor
    precision: Tensor

    def step(self, damping: Tensor) -> Tensor:
        diagonal = self.precision[..., :1]
        size = diagonal.abs().clamp(min=torch.finfo(diagonal.dtype).tiny)
        damped = diagonal + damping[..., None, None] * size
        root = banded.nearest_root(torch.cat([damped, self.precision[..., 1:]], -1))
        return banded.solve_both(root, self.slope)

    def deviations(self) -> Tensor:
        return deviations_of(self.precision)

    def mass(self) -> Tensor:
        return self.value - 0.5 * banded.log_det(banded.nearest_root(self.precision))

    def gaussian(self, place: Tensor) -> PathGaussian:
        root = banded.nearest_root(self.precision)
        return PathGaussian(place, banded.solve(root, self.slope), root)

    def is_finite(self) -> Tensor:
        return self.slope.isfinite().all(-1) & self.precision.isfinite().all(-1).all(-1)

    def chosen(self, other: Look, better: Tensor) -> Look:
        return Look(
            torch.where(better, other.value, self.value),
            torch.where(better[..., None], other.slope, self.slope),
            torch.where(better[..., None, None], other.precision, self.precision),
        )


def added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two matrices that may differ in how many bands they have."""
    width = max(first.shape[-1], second.shape[-1])
    wide = [torch.nn.functional.pad(m, (0, width - m.shape[-1])) for m in (first, second)]
    return wide[0] + wide[1]


def deviations_of(precision: Tensor) -> Tensor:
    """The standard deviations that a precision says: the gradient of its log determinant."""
    with torch.enable_grad():
        precision = precision.detach().requires_grad_()
        total = banded.log_det(banded.nearest_root(precision)).sum()
        (slope,) = torch.autograd.grad(total, precision)
    return slope[..., 0].clamp(min=0.0).sqrt()
