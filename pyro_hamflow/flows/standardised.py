"""A flow in coordinates of its own: what it draws, and how likely positions are."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow


class StandardisedFlow:
    """Densities of a guide whose flow lives where the posterior is about standard.

    Attributes:
        flow: The flow.
        loc: Where its coordinates have zero, of shape ``(dimension,)``.
        scale_tril: A unit of them, a lower triangle of shape ``(dimension, dimension)``.
    """

    flow: NeuralHamiltonianFlow
    loc: Tensor
    scale_tril: Tensor

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        r"""Positions on the real line, and the log density that their weights divide by.

        That is :math:`\log M(q, p) - \log r(p \mid q)` of the phase drawn: over it, weights
        :math:`p(\theta, y)` have the evidence as their mean. Gradients flow through both.

        Returns:
            Positions of shape ``(num_samples, dimension)``, and one number for each.
        """
        flow = self.flow
        q, p, log_density = flow.draw_phase((num_samples,))
        log_ratio = log_density - flow.end_momenta.log_density(q, p)
        return self.to_position(q), log_ratio - self.log_volume()

    def log_ratio(self, position: Tensor) -> Tensor:
        """The same log density at given positions, with momenta drawn from r(p | q)."""
        return self.flow.log_ratio(self.standardise(position)) - self.log_volume()

    def standardise(self, position: Tensor) -> Tensor:
        """Positions ``(*, dimension)`` in the flow's coordinates."""
        centred = (position - self.loc).mT
        return torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).mT

    def to_position(self, q: Tensor) -> Tensor:
        """Positions on the real line, from the flow's coordinates ``(*, dimension)``."""
        return self.loc + q @ self.scale_tril.mT

    def log_volume(self) -> Tensor:
        """The logarithm of the volume of a unit cube of the flow's coordinates."""
        return self.scale_tril.diagonal().log().sum()


def standardised(base: Any, loc: Tensor, scale: Tensor) -> Any:
    """A distribution of positions as one of the flow's coordinates, whose scale is diagonal.

    Arguments:
        base: The distribution, with event shape ``(dimension,)``.
        loc: Where the coordinates have zero.
        scale: Their units, of shape ``(dimension,)``.
    """
    transform = dist.transforms.AffineTransform(-loc / scale, 1.0 / scale, event_dim=1)
    return dist.TransformedDistribution(base, [transform])
