"""Kinetic energies that flows learn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from pyro_hamflow.dynamics.kinetic import GaussianKinetic, VectorField, times
from pyro_hamflow.networks.fields import LinearField
from pyro_hamflow.networks.perceptron import ScalarNetwork


class LearnedKinetic(Protocol):
    """What flows want of a kinetic energy, a module: its value, and its gradient, the velocity."""

    def energy(self, r: Tensor) -> Tensor:
        """K(r) of momenta ``(*, dimension)``, of shape ``(*,)``."""

    def velocity_field(self) -> VectorField:
        """The gradient of K as a function of momenta, at the present parameters."""


class LearnedGaussianKinetic(nn.Module):
    r"""The classical energy :math:`K(r) = \tfrac12 r^\top A r`, its inverse mass A learned.

    :math:`A = C C^\top`, C a lower triangle with positive diagonal, is positive definite whatever
    the parameters; it starts as the identity. In two dimensions there are three numbers to learn.

    Arguments:
        dimension: Of the momenta.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023), equation 5
        | https://hal.science/hal-03976501

    Example:
        >>> LearnedGaussianKinetic(2).energy(torch.tensor([[3.0, 4.0]]))
        tensor([12.5000], grad_fn=<MulBackward0>)
    """

    _indices: Tensor

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.log_diagonal = nn.Parameter(torch.zeros(dimension))
        self.below = nn.Parameter(torch.zeros(dimension * (dimension - 1) // 2))
        below = torch.tril_indices(dimension, dimension, -1)
        self.register_buffer("_indices", below, persistent=False)

    @property
    def inverse_mass(self) -> Tensor:
        """A, of shape ``(dimension, dimension)``."""
        rows, columns = self._indices[0], self._indices[1]
        root = torch.diag(self.log_diagonal.exp()).index_put((rows, columns), self.below)
        return root @ root.mT

    def energy(self, r: Tensor) -> Tensor:
        return GaussianKinetic(self.inverse_mass).energy(r)

    def velocity_field(self) -> VectorField:
        return LinearField(self.inverse_mass)


class RelativisticKinetic(LearnedGaussianKinetic):
    r"""The energy :math:`K(r) = c^2 \sqrt{1 + r^\top A r / c^2}`, A and c learned.

    Velocities :math:`A r / \sqrt{1 + r^\top A r / c^2}` are bounded, so that far momenta cannot
    throw positions out; for large c it is the classical energy, but for a constant.

    Arguments:
        dimension: Of the momenta.

    References:
        | Relativistic Monte Carlo (Lu et al., 2017)
        | https://arxiv.org/abs/1609.04388

    Example:
        >>> velocity = RelativisticKinetic(2).velocity_field()
        >>> velocity(torch.tensor([[1e6, 0.0]])).norm() <= 3.001
        tensor(True)
    """

    def __init__(self, dimension: int) -> None:
        super().__init__(dimension)
        self.log_speed = nn.Parameter(torch.tensor(3.0).log())

    def energy(self, r: Tensor) -> Tensor:
        square = (2.0 * self.log_speed).exp()
        return square * (1.0 + 2.0 * super().energy(r) / square).sqrt()

    def velocity_field(self) -> VectorField:
        inverse_mass, inverse_square = self.inverse_mass, (-2.0 * self.log_speed).exp()

        def field(r: Tensor) -> Tensor:
            plain = times(r, inverse_mass)
            return plain * (1.0 + inverse_square * (r * plain).sum(-1, keepdim=True)).rsqrt()

        return field


class NeuralKinetic(nn.Module):
    r"""A multilayer perceptron as kinetic energy, beside a quadratic part.

    With the quadratic part a flow begins about as one with the classical energy does. Flows of two
    perceptrons alone may stay where they start for thousands of training steps.

    Arguments:
        dimension: Of the momenta.
        hidden: The widths of its hidden layers.
        inverse_mass: Adds :math:`\tfrac12 k \lVert r \rVert^2`, k learned from this value on; with
            None the energy is the perceptron alone, as in the papers.
        symmetric: Whether K(-r) = K(r).

    References:
        | Hamiltonian Generative Networks (Toth et al., 2020)
        | https://openreview.net/forum?id=HJenn6VFvB

    Example:
        >>> NeuralKinetic(2).velocity_field()(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        dimension: int,
        hidden: Sequence[int] = (128, 128),
        *,
        inverse_mass: float | None = 1.0,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        self.network = ScalarNetwork(dimension, hidden, symmetric=symmetric)
        given = inverse_mass is not None
        self.inverse_mass = nn.Parameter(torch.tensor(inverse_mass)) if given else None

    def energy(self, r: Tensor) -> Tensor:
        value = self.network(r)
        if self.inverse_mass is None:
            return value
        return value + 0.5 * self.inverse_mass * r.square().sum(-1)

    def velocity_field(self) -> VectorField:
        return self.network.field(self.inverse_mass)
