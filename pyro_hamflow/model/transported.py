r"""A model's density seen through an invertible map of its parameters.

With :math:`\theta = T(z)`, draws of :math:`U(T(z)) - \log|\det \partial T / \partial z|` are, moved
by T, draws of the posterior, whatever the bijection T. One that takes N(0, I) to nearly the
posterior leaves samplers a nearly round target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.capture import Program


class Transport(Protocol):
    """An invertible map of :math:`R^d` onto itself, of rows ``(rows, dimension)``.

    A module that moves and scales is a few lines:

        >>> class Affine:
        ...     shift, scale = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
        ...
        ...     def forward(self, z):
        ...         return self.shift + self.scale * z, self.scale.log().sum().expand(len(z))
        ...
        ...     def inverse(self, x):
        ...         return (x - self.shift) / self.scale, -self.scale.log().sum().expand(len(x))
        >>> def model():
        ...     pyro.sample("x", dist.Normal(torch.tensor([1.0, 2.0]), 0.5).to_event(1))
        >>> target = TransportedTarget(Potential(model), Affine())
        >>> value, gradient = target.graph("gradient", 1)(torch.ones(1, 2), torch.zeros(1, 0))
        >>> gradient  # of half (z ** 2 + 36 z ** 2)
        tensor([[ 1., 36.]])
    """

    def forward(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """Positions from coordinates, and the logarithm of the volume's growth, ``(rows,)``."""

    def inverse(self, x: Tensor, /) -> tuple[Tensor, Tensor]:
        """Coordinates from positions, and the logarithm of the volume's growth on the way back."""


class TransportedTarget:
    """A potential seen through a map, which must not change from then on: a target.

    Its positions are the map's coordinates; noise is as it was.

    Arguments:
        potential: The potential.
        transport: The map.
    """

    def __init__(self, potential: Potential, transport: Transport) -> None:
        self.potential, self.transport = potential, transport
        self.dimension, self.noise_dimension = potential.dimension, potential.noise_dimension
        self.example = potential.example

    def graph(self, kind: str, num_chains: int) -> Program:
        """Potential and gradients in the map's coordinates."""
        inner = self.potential.graph(kind, num_chains)

        def program(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
            found: list[Tensor] = []

            def gradient_at(moved: Tensor) -> Tensor:
                found.extend(inner(moved, noise))
                return found[1]

            log_volume, gradient = pulled_back(self.transport.forward, position, gradient_at)
            return found[0] - log_volume, gradient, *found[2:]

        return program

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Coordinates and noise to capture programs with."""
        return self.potential.vectors(num_chains)

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Captures a function, and compiles it where the potential's own are."""
        return self.potential.programs.accelerate(self, name, function, *examples)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """The potential in the map's coordinates, and the local sites that belong to it."""
        moved, log_volume = self.positions(position)
        found = self.potential.evaluate(moved, noise)
        return found._replace(value=found.value - log_volume)

    @torch.no_grad()
    def positions(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """The model's positions, and the logarithm of the volume's growth.

        Arguments:
            coordinates: Of shape ``(chains, dimension)``.
        """
        move = self.accelerate("transport", self.transport.forward, coordinates)
        return move(coordinates)

    @torch.no_grad()
    def coordinates(self, position: Tensor) -> Tensor:
        """The map's coordinates of the model's positions ``(chains, dimension)``."""
        return self.transport.inverse(position)[0].detach()


class TransportedPart:
    """A map of some coordinates that leaves the others as they are.

    Arguments:
        transport: The map.
        moved: The coordinates that it moves, of shape ``(moved,)``.
        dimension: How many there are in all.
    """

    def __init__(self, transport: Transport, moved: Tensor, dimension: int) -> None:
        kept = torch.ones(dimension, dtype=torch.bool, device=moved.device)
        kept[moved] = False
        self.transport, self.moved, self.kept = transport, moved, kept.nonzero()[:, 0]
        self._back = torch.cat([self.moved, self.kept]).argsort()

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        return self._by(self.transport.forward, z)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._by(self.transport.inverse, x)

    def _by(
        self, move: Callable[[Tensor], tuple[Tensor, Tensor]], rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        moved, log_volume = move(rows[:, self.moved])
        return torch.cat([moved, rows[:, self.kept]], -1)[:, self._back], log_volume


def pulled_back(
    move: Callable[[Tensor], tuple[Tensor, Tensor]],
    rows: Tensor,
    gradient_at: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The gradient of a potential in the coordinates from which a map leads to it.

    Arguments:
        move: The map, or its inverse: to moved rows and the logarithm of the volume's growth.
        rows: Where to start, of shape ``(rows, dimension)``.
        gradient_at: The potential's gradient at the moved rows.

    Returns:
        The logarithm of the volume's growth; and the gradient of the potential that the moved
        density has at the rows.
    """
    with torch.enable_grad():
        start = rows.detach().requires_grad_()
        moved, log_volume = move(start)
        slope = gradient_at(moved.detach())
        total = (moved * slope).sum() - log_volume.sum()
        (gradient,) = torch.autograd.grad(total, start)
    return log_volume.detach(), gradient
