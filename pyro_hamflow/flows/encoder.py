"""Densities of momenta given positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hamflow.networks.perceptron import perceptron

_HALF_LOG = 0.5 * math.log(2.0 * math.pi)


class StandardMomenta(nn.Module):
    """Momenta N(0, I), whatever the position."""

    def draw(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Momenta of positions ``(*, D)``, and their log density, of shape ``(*,)``."""
        p = torch.randn_like(q)
        return p, self.log_density(q, p)

    def log_density(self, q: Tensor, p: Tensor) -> Tensor:
        """The log density of momenta given positions."""
        return (-0.5 * p.square() - _HALF_LOG).sum(-1)


class Encoder(nn.Module):
    r"""Momenta :math:`N(\mu(q), \operatorname{diag} \sigma(q)^2)`, two multilayer perceptrons.

    They start as N(0, I): the last layers of both networks are zero.

    Arguments:
        dimension: Of positions and momenta.
        hidden: The widths of the hidden layers.
        symmetric: Whether p given q is distributed as -p given -q.
    """

    def __init__(self, dimension: int, hidden: Sequence[int], *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.mean = perceptron(dimension, hidden, dimension, last=0.0)
        self.log_scale = perceptron(dimension, hidden, dimension, last=0.0)

    def forward(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and logarithm of the scale, at positions ``(*, D)``."""
        mean, log_scale = self.mean(q), self.log_scale(q)
        if self.symmetric:
            return 0.5 * (mean - self.mean(-q)), 0.5 * (log_scale + self.log_scale(-q))
        return mean, log_scale

    def draw(self, q: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self(q)
        noise = torch.randn_like(mean)
        log_density = (-0.5 * noise.square() - log_scale - _HALF_LOG).sum(-1)
        return mean + log_scale.exp() * noise, log_density

    def log_density(self, q: Tensor, p: Tensor) -> Tensor:
        mean, log_scale = self(q)
        noise = (p - mean) * (-log_scale).exp()
        return (-0.5 * noise.square() - log_scale - _HALF_LOG).sum(-1)
