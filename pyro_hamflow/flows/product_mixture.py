"""Mixtures of Gaussians of coordinates that are independent of each other, and which ones are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hamflow.flows.gaussian_mixture import GaussianMixture, fit_mixture

_REST = 0.05  # of a score's spread, that may hang on other coordinates
_LARGEST_CORRELATION = 0.5  # of values or ranks, which few independent modes show by chance


class ProductMixture(nn.Module):
    """Groups of coordinates, independent of each other, and a mixture of Gaussians of each.

    Its modes are all combinations of those of its parts, however many these are.

    Arguments:
        groups: The coordinates of each part, which add up to all.
        parts: Their mixtures.

    Example:
        >>> means, eyes = torch.tensor([[-3.0], [3.0]]), torch.ones(2, 1, 1)
        >>> part = GaussianMixture(torch.zeros(2), means, eyes)
        >>> mixture = ProductMixture([torch.tensor([0]), torch.tensor([1])], [part, part])
        >>> mixture.num_components
        4
    """

    def __init__(self, groups: Sequence[Tensor], parts: Sequence[GaussianMixture]) -> None:
        super().__init__()
        self.groups = [group.tolist() for group in groups]
        self.back = torch.cat(list(groups)).argsort().tolist()
        self.parts = nn.ModuleList(parts)

    @property
    def num_components(self) -> int:
        """How many Gaussians it would take as one mixture."""
        return math.prod(part.num_components for part in self._each)

    @property
    def _each(self) -> list[GaussianMixture]:
        return [part for part in self.parts if isinstance(part, GaussianMixture)]

    def draw(self, num_samples: int, freedom: float = math.inf) -> Tensor:
        """Draws of shape ``(num_samples, dimension)``; arguments as those of its parts."""
        drawn = [part.draw(num_samples, freedom) for part in self._each]
        return torch.cat(drawn, -1)[:, self.back]

    def log_density(self, position: Tensor, freedom: float = math.inf) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``."""
        pairs = zip(self._each, self.groups, strict=True)
        return sum(
            (part.log_density(position[:, group], freedom) for part, group in pairs),
            position.new_zeros(len(position)),
        )


@torch.no_grad()
def independent(position: Tensor, score: Tensor) -> Tensor:
    """Which coordinates seem independent of all others, ``(dimension,)``, true or false.

    The score of such a coordinate is a function of that coordinate alone, however few draws there
    are of its modes; and its modes do not go with those of others, which scores do not know of.

    Arguments:
        position: Draws, of shape ``(draws, dimension)``.
        score: The gradients of their log density.

    Example:
        >>> x = torch.randn(1000, 3).double()
        >>> curvature = torch.tensor([[1.0, 0.5, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 1.0]]).double()
        >>> independent(x, -x @ curvature).tolist()
        [False, False, True]
    """
    if position.shape[1] == 1:  # there are no others
        return torch.ones(1, dtype=torch.bool, device=position.device)
    order = position.argsort(0)
    along = score.gather(0, order)
    bend = along[1:-1] - 0.5 * (along[:-2] + along[2:])
    spread = (score - score.median(0).values).abs().median(0).values
    ranks = order.argsort(0).double()
    squares = (ranks - ranks.mean(0)).square()
    correlations = torch.stack([part.mT.corrcoef().abs() for part in (position, ranks, squares)])
    largest = correlations.amax(0).fill_diagonal_(0.0).amax(0)
    by_itself = bend.abs().median(0).values < _REST * spread
    return by_itself & (largest < _LARGEST_CORRELATION)


@torch.no_grad()
def fit_product(
    position: Tensor, score: Tensor, weights: Tensor, held_out: Tensor, alone: Tensor
) -> GaussianMixture | ProductMixture:
    """The mixture of all coordinates, or of each that is alone and of the rest: what does better.

    Arguments:
        position: As :func:`~pyro_hamflow.flows.gaussian_mixture.fit_mixture` has it.
        score: Likewise.
        weights: Likewise.
        held_out: Likewise; these judge.
        alone: Which coordinates seem independent of all others, ``(dimension,)``.
    """
    whole = fit_mixture(position, score, weights, held_out)
    if not bool(alone.any()) or len(alone) == 1:
        return whole
    groups = [*alone.nonzero(), *([rest] if len(rest := (~alone).nonzero()[:, 0]) else [])]
    parts = [fit_mixture(position[:, g], score[:, g], weights, held_out) for g in groups]
    product = ProductMixture(groups, parts)
    judges = weights[held_out] / weights[held_out].sum()
    values = [float(judges @ each.log_density(position[held_out])) for each in (whole, product)]
    return product if values[1] > values[0] else whole
