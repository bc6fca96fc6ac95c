"""A Gaussian whose mean and covariance are learned functions of a context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_hamflow.networks.perceptron import perceptron

_FURTHEST = 10.0  # standard deviations, beyond which a context is as if it were there


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Each matrix ``(*, rows, columns)`` times its own vector ``(*, columns)``."""
    return (matrix @ vector[..., None])[..., 0]


class ConditionalGaussian(nn.Module):
    r"""A Gaussian of positions given a context, by a perceptron of the context.

    The perceptron makes a mean m and a lower triangular matrix P, and
    :math:`P (x - m)` is standard normal, where x are the positions in units of their spread.

    Arguments:
        dimension: Of the positions.
        context_dimension: Of the context.
        hidden: The widths of the hidden layers.

    Example:
        >>> gaussian = ConditionalGaussian(2, 3)
        >>> location, root = gaussian.place(torch.zeros(5, 3))
        >>> location.shape, root.shape
        (torch.Size([5, 2]), torch.Size([5, 2, 2]))
    """

    centre: Tensor
    scale: Tensor
    context_centre: Tensor
    context_scale: Tensor

    def __init__(
        self, dimension: int, context_dimension: int, *, hidden: Sequence[int] = (128, 128)
    ) -> None:
        super().__init__()
        self.dimension = dimension
        self.context_dimension = context_dimension
        self.hidden = tuple(hidden)
        # Near the standard normal at first, whatever the context.
        outputs = dimension + dimension * (dimension + 1) // 2
        self.network = perceptron(context_dimension, hidden, outputs, last=0.1)
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))
        self.register_buffer("context_centre", torch.zeros(context_dimension))
        self.register_buffer("context_scale", torch.ones(context_dimension))

    @torch.no_grad()
    def whiten_by(self, position: Tensor, context: Tensor) -> None:
        """Sets mean and standard deviation, by which positions and contexts are standardised.

        Arguments:
            position: Of shape ``(points, dimension)``.
            context: Of shape ``(points, context_dimension)``.
        """
        for values, centre, scale in (
            (position, self.centre, self.scale),
            (context, self.context_centre, self.context_scale),
        ):
            centre.copy_(values.mean(0))
            spread = values.std(0)
            scale.copy_(torch.where(spread > 0, spread, 1.0))

    def forget_whitening(self) -> None:
        """Takes positions to be in units of their spread from here on."""
        self.centre.zero_()
        self.scale.fill_(1.0)

    @property
    def root(self) -> Tensor:
        """The standard deviations of positions, as a diagonal matrix."""
        return self.scale.diag()

    def whitened(self, position: Tensor) -> Tensor:
        """Positions in units of their spread."""
        return (position - self.centre) / self.scale

    def standardised(self, context: Tensor) -> Tensor:
        """A context, standardised; NaN becomes zero, and far values are clamped."""
        units = (context - self.context_centre) / self.context_scale
        return units.nan_to_num(nan=0.0).clamp(-_FURTHEST, _FURTHEST)

    def _parts(self, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The mean, the matrix P and the logarithms of its diagonal."""
        d = self.dimension
        mean, log_diagonal, below = self.network(self.standardised(context)).split(
            [d, d, d * (d - 1) // 2], -1
        )
        matrix = torch.diag_embed(log_diagonal.exp())
        rows, columns = torch.tril_indices(d, d, -1)
        matrix[..., rows, columns] = below
        return mean, matrix, log_diagonal

    def forward(self, position: Tensor, context: Tensor) -> Tensor:
        """The negative log density, up to a constant, of shape ``(*,)``.

        Arguments:
            position: Of shape ``(*, dimension)``.
            context: Of shape ``(*, context_dimension)``.
        """
        mean, matrix, log_diagonal = self._parts(context)
        normal = matvec(matrix, self.whitened(position) - mean)
        return 0.5 * normal.square().sum(-1) - log_diagonal.sum(-1)

    @torch.no_grad()
    def place(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The mean, of shape ``(*, dimension)``, and a lower triangular root of the covariance."""
        mean, matrix, _ = self._parts(context)
        eye = torch.eye(self.dimension).to(matrix).expand_as(matrix)
        root = torch.linalg.solve_triangular(matrix, eye, upper=False)
        return self.centre + self.scale * mean, self.scale[:, None] * root

    @property
    def sizes(self) -> dict[str, Any]:
        """What the network is made with."""
        return {
            "dimension": self.dimension,
            "context_dimension": self.context_dimension,
            "hidden": list(self.hidden),
        }
