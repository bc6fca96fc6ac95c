"""The inverse mass that suits a posterior, from positions and gradients that chains have visited.

For a normal posterior of covariance S, positions of covariance C, mixed or not, have gradients of
covariance G = S^-1 C S^-1, and S is the geometric mean of C and G^-1. So one window of draws, still
on its way, tells all scales and correlations, where draws alone would tell how far chains have got.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from pyro_hamflow.model.target import Target

_FEWEST_PER_DIMENSION = 2  # positions: a covariance of as many as dimensions is singular
_FLOOR = 1e3  # smallest spreads that count, in units of rounding
_WIDEST = 1e6  # range of spreads, scales apart, within which correlations survive rounding
_PROBES, _ROUNDS = 16, 4  # of all chains together, and how often from scales found before


class Covariance:
    """A running covariance of the rows of all chains, each about its own mean.

    Chains that have not met yet, as in the modes or the labellings of a mixture, are far from each
    other; what a step has to suit is the spread around each.

    Arguments:
        dimension: Of the rows.
        dense: Whether to keep the whole matrix, or its diagonal alone.
        device: Where rows lie.
    """

    def __init__(self, dimension: int, *, dense: bool, device: torch.device | None = None) -> None:
        self.dense = dense
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self._mean = zeros((1, dimension))
        self._sum = zeros((dimension, dimension) if dense else (dimension,))
        self._counts = zeros((1, 1))

    @property
    def count(self) -> int:
        """How many rows were taken in, less one for each chain, whose mean they tell."""
        return int((self._counts - 1.0).clamp(min=0.0).sum())

    def update(self, rows: Tensor) -> None:
        """Takes in a row of each chain, ``(chains, dimension)``; skips those not finite."""
        batch = rows.double()
        finite = batch.isfinite().all(-1, keepdim=True)
        old, self._counts = self._counts, self._counts + finite
        shift = torch.where(finite, batch - self._mean, 0.0)
        self._mean = self._mean + shift / self._counts.clamp(min=1.0)
        weighted = shift * old / self._counts.clamp(min=1.0)
        self._sum += weighted.mT @ shift if self.dense else (weighted * shift).sum(0)

    @staticmethod
    def joined(parts: Sequence[Covariance]) -> Covariance:
        """That of the rows of all chains of some others."""
        whole = Covariance(parts[0]._mean.shape[1], dense=parts[0].dense)
        whole._sum = torch.stack([part._sum for part in parts]).sum(0)
        whole._counts = torch.cat([part._counts for part in parts])
        return whole

    def value(self) -> Tensor:
        """The covariance, ``(dimension, dimension)``, or its diagonal, ``(dimension,)``."""
        return self._sum / max(self.count, 1)

    def inverse_mass(self, old: Tensor) -> Tensor:
        """An inverse mass by the covariance alone, where no gradients are known.

        A whole matrix from few positions has directions without any spread, in which no step can
        be made; it is shrunk a little towards its diagonal besides.

        Arguments:
            old: The inverse mass so far, which stays where nothing moved.
        """
        if not self.dense:
            return torch.where(self.value() > 0.0, self.value(), old.double()).to(old)
        value = self.value()
        few = self.count < _FEWEST_PER_DIMENSION * len(value)
        share = 0.0 if few else self.count / (self.count + 5.0)
        spread = value.diag()
        rest = torch.where(spread > 0.0, (1.0 - share) * spread, old.diag().double())
        return (share * value + torch.diag(rest)).to(old)


class Metric:
    """Learns an inverse mass from the positions of chains and the gradients there.

    Arguments:
        dimension: Of the positions.
        dense: Whether the mass is a whole matrix, or its diagonal alone.
        device: Where positions lie.

    References:
        | Tuning diagonal scale matrices for HMC (Tran and Kleppe, 2024)
        | https://arxiv.org/abs/2403.07495

    Example:
        >>> scale = torch.tensor([1e-6, 1.0, 1e6]).double()
        >>> metric = Metric(3, dense=False)
        >>> for z in torch.randn(20, 4, 3).double() * scale / 100.0:  # not nearly mixed
        ...     metric.update(z, z / scale**2)
        >>> (metric.inverse_mass(torch.ones(3)).sqrt() / scale).round(decimals=6).tolist()
        [1.0, 1.0, 1.0]
    """

    def __init__(self, dimension: int, *, dense: bool, device: torch.device | None = None) -> None:
        self.positions = Covariance(dimension, dense=dense, device=device)
        self.gradients = Covariance(dimension, dense=dense, device=device)

    @property
    def count(self) -> int:
        """How many rows were taken in, less one for each chain."""
        return self.positions.count

    def update(self, position: Tensor, gradient: Tensor) -> None:
        """Takes in positions and the potential's gradients there, ``(chains, dimension)`` each."""
        finite = (position.isfinite() & gradient.isfinite()).all(-1, keepdim=True)
        self.positions.update(torch.where(finite, position, torch.nan))
        self.gradients.update(torch.where(finite, gradient, torch.nan))

    @staticmethod
    def joined(parts: Sequence[Metric]) -> Metric:
        """What some others have learned together; it takes in no more."""
        whole = Metric(parts[0].positions._mean.shape[1], dense=parts[0].positions.dense)
        whole.positions = Covariance.joined([part.positions for part in parts])
        whole.gradients = Covariance.joined([part.gradients for part in parts])
        return whole

    def inverse_mass(self, old: Tensor) -> Tensor:
        """The inverse mass by all that was taken in, of the form of the one before.

        Moves that keep no gradient leave nothing but the covariance of positions.
        """
        if not self.gradients.value().any():
            return self.positions.inverse_mass(old)
        return inverse_mass_of(self.positions.value(), self.gradients.value(), self.count, old)


def inverse_mass_of(positions: Tensor, gradients: Tensor, count: int, old: Tensor) -> Tensor:
    r"""The inverse mass under which both covariances look alike.

    Arguments:
        positions: Their covariance C, a matrix or a diagonal.
        gradients: The covariance G of the gradients there.
        count: From how many positions both come: where these are few for a matrix, a diagonal is
            all that is taken from them, and nothing if there is a matrix already.
        old: The inverse mass so far, of the form of the new one: it stays where nothing moved.

    Returns:
        The geometric mean of :math:`C` and :math:`G^{-1}`.
    """
    dense = old.dim() == 2
    of_positions, of_gradients = (c.diag() if dense else c for c in (positions, gradients))
    before = (old.diag() if dense else old).double()
    scale, known = _ratio(of_positions.sqrt(), of_gradients.sqrt(), before)
    if not dense:
        return scale.to(old)
    few = count < _FEWEST_PER_DIMENSION * len(old)
    if few and bool((old - torch.diag(old.diag())).any()):
        return old
    # What both diagonals are in units in which they are equal.
    common = torch.where(known, (of_positions * of_gradients).sqrt(), 1.0)
    if few or common.max() > _WIDEST * common.min():
        return torch.diag(scale).to(old)
    root = scale.sqrt()
    unit, both = torch.outer(root, root), torch.outer(known, known)
    rest = torch.diag(common * torch.where(known, _FLOOR * torch.finfo(old.dtype).eps, 1.0))
    first, second = (torch.where(both, c, 0.0) for c in (positions / unit, gradients * unit))
    return (unit * _geometric_mean(first + rest, second + rest)).to(old)


def _ratio(spread: Tensor, change: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """An inverse mass of each coordinate: its spread over the change of its gradient.

    Arguments:
        spread: How far positions are apart, of shape ``(dimension,)``.
        change: How far their gradients are.
        old: What to keep where the ratio is no positive number.

    Returns:
        The values, and whether they are new.
    """
    ratio = spread / change
    known = ratio.isfinite() & (ratio > 0.0)
    return torch.where(known, ratio, old), known


def _geometric_mean(first: Tensor, second: Tensor) -> Tensor:
    """The geometric mean of the first matrix and the second one's inverse."""
    values, vectors = torch.linalg.eigh(second)
    values = values.clamp(min=values[-1] * torch.finfo(values.dtype).eps)
    root, back = (vectors * values**power @ vectors.mT for power in (0.5, -0.5))
    values, vectors = torch.linalg.eigh(root @ first @ root)
    values = values.clamp(min=values[-1] * torch.finfo(values.dtype).eps)
    mean = back @ (vectors * values.sqrt()) @ vectors.mT @ back
    return (mean + mean.mT) / 2.0


def first_scales(target: Target, position: Tensor, noise: Tensor) -> Tensor:
    """A first diagonal, from how fast gradients change about the points where chains start.

    Points are drawn about each start in a box, and then, again and again, about as far as the
    scales found before reach; each coordinate's inverse mass is how far the points lie apart in it,
    over how far their gradients do. For a normal density that balances the rows of its precision
    matrix, whatever their sizes.

    Arguments:
        target: The target.
        position: Where chains start, of shape ``(chains, dimension)``.
        noise: Their noise.

    Returns:
        The diagonal of an inverse mass, of shape ``(dimension,)``.
    """
    chains = len(position)
    gradient = target.graph("gradient", chains)
    scale = torch.ones_like(position[0])
    _, here = gradient(position, noise)
    for _ in range(_ROUNDS):
        changes = []
        for _ in range(max(1, _PROBES // chains)):
            shift = scale.sqrt() * (2.0 * torch.rand_like(position) - 1.0)
            _, there = gradient(position + shift, noise)
            change = (there - here).abs()
            good = change.isfinite().all(-1, keepdim=True)
            changes.append(torch.where(good, change, torch.nan))
        change = torch.cat(changes).double().nanmedian(0).values
        spread = 0.5 * scale.double().sqrt()
        scale = _ratio(spread, change, scale.double())[0].to(position)
    return scale
