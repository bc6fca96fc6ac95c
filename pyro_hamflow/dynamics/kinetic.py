"""Kinetic energies: fixed ones, which samplers draw momenta from, and learned ones of flows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

VectorField = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class GaussianKinetic:
    r"""The energy :math:`K(r) = \tfrac12 r^\top M^{-1} r` of momenta :math:`r \sim N(0, M)`.

    Arguments:
        inverse_mass: :math:`M^{-1}`: of shape ``(dimension,)`` for a diagonal mass, all ones being
            the identity, or ``(dimension, dimension)`` for a dense one. It should resemble the
            posterior's covariance.

    Example:
        >>> kinetic = GaussianKinetic(torch.tensor([4.0, 1.0]))
        >>> kinetic.energy(torch.tensor([[1.0, 2.0]]))
        tensor([4.])
    """

    inverse_mass: Tensor

    @property
    def is_dense(self) -> bool:
        """Whether the inverse mass is a whole matrix."""
        return self.inverse_mass.dim() == 2

    @property
    def is_identity(self) -> bool:
        """Whether it is the identity."""
        ones = torch.ones_like(self.inverse_mass[0] if self.is_dense else self.inverse_mass)
        return torch.equal(self.inverse_mass, torch.diag(ones) if self.is_dense else ones)

    @cached_property
    def root(self) -> Tensor:
        """The square root of the inverse mass, a lower triangle if dense."""
        if self.inverse_mass.dim() == 1:
            return self.inverse_mass.sqrt()
        return torch.linalg.cholesky(self.inverse_mass.double()).to(self.inverse_mass)

    def sample(self, num_chains: int) -> Tensor:
        """Momenta for every chain, of shape ``(chains, dimension)``."""
        noise = torch.randn(
            num_chains,
            len(self.inverse_mass),
            dtype=self.inverse_mass.dtype,
            device=self.inverse_mass.device,
        )
        if self.inverse_mass.dim() == 1:
            return noise / self.root
        return torch.linalg.solve_triangular(self.root, noise, upper=False, left=False)

    def energy(self, r: Tensor) -> Tensor:
        """K(r) of every chain, of shape ``(chains,)``."""
        return 0.5 * (r * times(r, self.inverse_mass)).sum(-1)


def times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Rows times a matrix, or times a diagonal one.

    Momenta times the inverse mass are velocities. Times its root, as :class:`GaussianKinetic` gives
    it, momenta are N(0, I), their energy is half their sum of squares, and they are velocities
    themselves; a gradient times the root is that by the positions that move so.

    Arguments:
        rows: Of shape ``(*, dimension)``.
        matrix: Of shape ``(dimension, dimension)``, or its diagonal, ``(dimension,)``.
    """
    return rows * matrix if matrix.dim() == 1 else rows @ matrix
