"""What the training of a learned energy makes small."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from pyro_hamflow.checks import between, whole
from pyro_hamflow.surrogates.potential_network import PotentialNetwork


class Points(NamedTuple):
    """What is known of the true energy, in the order in which it was found.

    Attributes:
        position: Of shape ``(points, dimension)``.
        value: The energies, of shape ``(points,)``.
        gradient: Their gradients, of shape ``(points, dimension)``.
        context: What was held there, of shape ``(points, context_dimension)``.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    context: Tensor

    def pick(self, index: Tensor) -> Points:
        """Some of the points."""
        return Points(*(part[index] for part in self))

    def whitened(self, network: PotentialNetwork) -> Points:
        """The same in a network's whitened coordinates, energies shifted to mean zero."""
        position, gradient = network.whitened(self.position), self.gradient @ network.root
        return Points(position, self.value - self.value.mean(), gradient, self.context)


class TrajectorySegments(NamedTuple):
    """Stretches of true leapfrog trajectories.

    Attributes:
        position: Of shape ``(stretches, steps + 1, dimension)``.
        step_size: Of shape ``(stretches,)``.
        inverse_mass: Of shape ``(stretches, dimension, dimension)``.
    """

    position: Tensor
    step_size: Tensor
    inverse_mass: Tensor

    def pick(self, index: Tensor) -> TrajectorySegments:
        """Some of the stretches."""
        return TrajectorySegments(*(part[index] for part in self))

    def whitened(self, network: PotentialNetwork) -> TrajectorySegments:
        """The same in a network's whitened coordinates."""
        back = network.inverse_root
        return TrajectorySegments(
            network.whitened(self.position), self.step_size, back @ self.inverse_mass @ back.mT
        )


EnergyLoss = Callable[[PotentialNetwork, Any], Tensor]


@dataclass(frozen=True)
class GradientMatching:
    """The mean squared error of the gradient in whitened coordinates, and that of the energy.

    Where the true gradient is many times what is usual, as where chains came from, errors count
    for less. An energy's constant does not count.

    Arguments:
        energy_weight: Of the energy's squared error.

    Example:
        >>> network = PotentialNetwork(2)
        >>> z = torch.randn(100, 2)
        >>> points = Points(z, 0.5 * z.square().sum(-1), z, z[:, :0])
        >>> bool(GradientMatching()(network, points) < 0.1)
        True
    """

    energy_weight: float = 1.0

    def __post_init__(self) -> None:
        between("energy_weight", self.energy_weight, 0.0, math.inf, ends="low")

    def __call__(self, network: PotentialNetwork, points: Points) -> Tensor:
        value, gradient = network.of_whitened(network.whitened(points.position), points.context)
        true = points.gradient @ network.root
        size = true.square().sum(-1)
        weight = 1.0 / (1.0 + size / (4.0 * size.median() + network.dimension))
        weight = weight / weight.mean()
        loss = (weight[:, None] * (gradient - true).square()).mean()
        if self.energy_weight:
            error = value - points.value
            error = error - (weight * error).mean()
            loss = loss + self.energy_weight * (weight * error.square()).mean()
        return loss


@dataclass(frozen=True)
class TrajectoryMatching:
    r"""The mean squared distance between true trajectories and those of the network.

    Both begin with the same two points; from there the network's follow
    :math:`z_{n+1} = 2 z_n - z_{n-1} - h^2 M^{-1} \nabla V(z_n)`, the leapfrog steps with momenta
    left out. Positions and their differences, the momenta, are compared in whitened coordinates.

    Arguments:
        num_steps: How many steps a trajectory has, 2 or more.
    """

    num_steps: int = 5

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps, 2)

    def __call__(self, network: PotentialNetwork, trajectories: TrajectorySegments) -> Tensor:
        true, size, mass = trajectories
        before, here = true[:, 0], true[:, 1]
        scale = size[:, None]
        loss = true.new_zeros(())
        for n in range(2, true.shape[1]):
            gradient = network.value_and_gradient(here)[1]
            kick = scale.square() * (gradient[:, None] @ mass)[:, 0]
            before, here = here, 2.0 * here - before - kick
            miss = (here - true[:, n]) @ network.inverse_root.mT
            change = here - before - true[:, n] + true[:, n - 1]
            spin = change @ network.inverse_root.mT / scale
            loss = loss + (miss.square() + spin.square()).mean()
        return loss / (true.shape[1] - 2)
