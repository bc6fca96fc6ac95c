"""Mixtures of Gaussians, fitted to draws together with the gradients of their log density."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MOST = 64  # components
_GAIN = 0.01  # of the mean held-out log density, for which more components are taken
_PATIENCE = 3  # rounds of splits that bring no gain, before the search ends
_FEW = 20  # draws, of which no two components are made
_PASSES = 10  # of the search for centres, and of one fit
_NEGLIGIBLE = 1e-4  # share of a draw that a component may leave out of its moments
_LEAST_SHARE = 1e-3
_LITTLE = 1e-3  # of a draw: a unit where a component has none
_LEAST = 1e-12  # of an eigenvalue


class GaussianMixture(nn.Module):
    """A mixture of Gaussians. Its shares are learned; its components stay as they are.

    Arguments:
        log_shares: Of the components, of shape ``(components,)``; normalised here.
        mean: Of shape ``(components, dimension)``.
        scale_tril: Of shape ``(components, dimension, dimension)``.

    Example:
        >>> means, eyes = torch.tensor([[-3.0, 0.0], [3.0, 0.0]]), torch.eye(2).expand(2, 2, 2)
        >>> mixture = GaussianMixture(torch.zeros(2), means, eyes)
        >>> position = mixture.draw(5)
        >>> mixture.log_density(position).shape
        torch.Size([5])
    """

    mean: Tensor
    scale_tril: Tensor
    inverse_root: Tensor

    def __init__(self, log_shares: Tensor, mean: Tensor, scale_tril: Tensor) -> None:
        super().__init__()
        self.log_shares = nn.Parameter(log_shares)
        eye = torch.eye(mean.shape[-1]).to(mean).expand_as(scale_tril)
        self.register_buffer("mean", mean)
        self.register_buffer("scale_tril", scale_tril)
        self.register_buffer(
            "inverse_root", torch.linalg.solve_triangular(scale_tril, eye, upper=False)
        )

    @property
    def num_components(self) -> int:
        return len(self.mean)

    def draw(self, num_samples: int, freedom: float = math.inf) -> Tensor:
        """Draws of shape ``(num_samples, dimension)``.

        Arguments:
            num_samples: How many.
            freedom: Degrees of freedom of Student's t, which each component is if they are finite.
        """
        _, dimension = self.mean.shape
        picked = torch.multinomial(self.log_shares.detach().softmax(0), num_samples, True)
        standard = torch.randn(num_samples, dimension).to(self.mean)
        if math.isfinite(freedom):
            squares = torch.distributions.Chi2(freedom).sample((num_samples, 1)).to(standard)
            standard = standard * (freedom / squares).sqrt()
        moved = standard @ self.scale_tril.mT  # by every component
        return self.mean[picked] + moved[picked, torch.arange(num_samples)]

    def log_density(self, position: Tensor, freedom: float = math.inf) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``.

        Arguments:
            position: Where.
            freedom: As in :meth:`draw`.
        """
        return torch.logsumexp(self.log_parts(position, freedom), 0)

    def log_parts(self, position: Tensor, freedom: float = math.inf) -> Tensor:
        """The share of each component times its density, ``(components, positions)``."""
        dimension = position.shape[-1]
        # One product for all components, whatever their number.
        offset = (self.inverse_root @ self.mean[..., None]).mT
        squares = (position @ self.inverse_root.mT - offset).square().sum(-1)
        if math.isfinite(freedom):
            half = 0.5 * (freedom + dimension)
            norm = math.lgamma(half) - math.lgamma(0.5 * freedom)
            norm -= 0.5 * dimension * math.log(freedom * math.pi)
            kernel = norm - half * (squares / freedom).log1p()
        else:
            kernel = -0.5 * squares - 0.5 * dimension * math.log(2.0 * math.pi)
        log_volume = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return kernel + (self.log_shares.log_softmax(0) - log_volume)[:, None]


@torch.no_grad()
def fit_mixture(
    position: Tensor, score: Tensor, weights: Tensor, held_out: Tensor
) -> GaussianMixture:
    """A mixture that grows: the components that gain most by it are split in two, in rounds.

    So small modes are found one by one that a mixture begun with all of its components misses. It
    ends where held-out draws gain no more.

    Arguments:
        position: Draws in coordinates where they are about standard, ``(draws, dimension)``.
        score: The gradient of their log density, of the same shape.
        weights: Of the draws, ``(draws,)``; their mean is one.
        held_out: Which draws judge the components, ``(draws,)``, true or false.

    Example:
        >>> x = torch.randn(500, 2)
        >>> held_out = torch.arange(500) % 4 == 0
        >>> fit_mixture(x, -x, torch.ones(500), held_out).num_components
        1
    """
    draws = _Draws(position, score, weights)
    kept, judges = draws.where(~held_out), draws.where(held_out)
    most = min(_MOST, max(1, len(kept.weights) // (2 * position.shape[-1])))
    mixture = _from_shares(*kept, shares=kept.weights.new_ones(1, len(kept.weights)))
    best, value, waited = mixture, _mean_log_density(mixture, judges), 0
    while waited < _PATIENCE and (halves := _splits(mixture, kept)):
        mixture = _maximise(_with_splits(mixture, halves), kept)
        if mixture.num_components > most:
            break
        measured = _mean_log_density(mixture, judges)
        waited = 0 if measured > value + _GAIN else waited + 1
        if waited == 0:
            best, value = mixture, measured
    return _maximise(best, draws)


def _mean_log_density(mixture: GaussianMixture, draws: _Draws) -> float:
    weights = draws.weights / draws.weights.sum()
    return float(weights @ mixture.log_density(draws.position))


class _Draws(NamedTuple):
    """Draws, the scores there, and their weights."""

    position: Tensor
    score: Tensor
    weights: Tensor

    def where(self, chosen: Tensor) -> _Draws:
        return _Draws(*(part[chosen] for part in self))


def _splits(mixture: GaussianMixture, draws: _Draws) -> dict[int, GaussianMixture]:
    """By component, the two that are to replace it: where that gains about as much as anywhere."""
    owner = mixture.log_parts(draws.position).argmax(0)
    halves, gains = {}, {}
    for index in range(mixture.num_components):
        own = draws.where(owner == index)
        if len(own.weights) < _FEW:
            continue
        one = _component(mixture, index)
        two = halves[index] = _maximise(_halves(one, own), own)
        by = two.log_density(own.position) - one.log_density(own.position)
        gains[index] = float(own.weights @ by)
    most = max(gains.values(), default=0.0)
    return {index: halves[index] for index in gains if gains[index] >= min(most, 0.5 * most)}


def _component(mixture: GaussianMixture, index: int) -> GaussianMixture:
    """One component by itself."""
    only = slice(index, index + 1)
    return GaussianMixture(mixture.log_shares[only], mixture.mean[only], mixture.scale_tril[only])


def _halves(one: GaussianMixture, own: _Draws) -> GaussianMixture:
    """Two components, of the clusters of a component's draws, in its own unit."""
    standard = (own.position - one.mean[0]) @ one.inverse_root[0].mT
    nearest = torch.cdist(standard, _two_centres(standard, own.weights)).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, 2).mT.to(standard)
    return _from_shares(*own, shares=shares)


def _with_splits(
    mixture: GaussianMixture, halves: Mapping[int, GaussianMixture]
) -> GaussianMixture:
    """The mixture, with the two halves of components that are split in place of these."""
    log_shares = mixture.log_shares.log_softmax(0)
    parts = [halves.get(i) or _component(mixture, i) for i in range(mixture.num_components)]
    each = [part.log_shares.log_softmax(0) for part in parts]
    return GaussianMixture(
        torch.cat([total + share for total, share in zip(log_shares, each, strict=True)]),
        torch.cat([part.mean for part in parts]),
        torch.cat([part.scale_tril for part in parts]),
    )


def _maximise(mixture: GaussianMixture, draws: _Draws) -> GaussianMixture:
    """Expectation and maximisation in turn."""
    shares = mixture.log_parts(draws.position).softmax(0)
    for _ in range(_PASSES):
        mixture = _from_shares(*draws, shares=shares)
        updated = mixture.log_parts(draws.position).softmax(0)
        change = float((updated - shares).abs().mean())
        shares = updated
        if change < 1e-3 / len(shares):
            break
    return mixture


def _two_centres(position: Tensor, weights: Tensor) -> Tensor:
    """Centres of two clusters: of draws far apart, and then of those that are nearest to each."""
    first = position[torch.multinomial(weights, 1)]
    distance = torch.cdist(position, first)[:, 0].square() * weights + _LEAST
    centres = torch.cat([first, position[torch.multinomial(distance, 1)]])
    for _ in range(_PASSES):
        nearest = torch.cdist(position, centres).argmin(1)
        belongs = weights * torch.nn.functional.one_hot(nearest, 2).mT.to(position)
        total = belongs.sum(1, keepdim=True)
        centres = torch.where(total > 0, (belongs @ position) / total.clamp(min=_LEAST), centres)
    return centres


def _from_shares(
    position: Tensor, score: Tensor, weights: Tensor, shares: Tensor
) -> GaussianMixture:
    """Components by the moments of draws and scores that belong to each, ``(components, draws)``.

    For a Gaussian of covariance S the draws' covariance is S, the scores' is its inverse, and the
    mean is where the score is zero. From few draws S is told best by both, as the matrix that takes
    the one into the other. Both are first drawn towards the identity, as if a few draws more had
    it, in a unit of each coordinate that is the component's own: it may be far narrower than all.
    """
    dimension = position.shape[-1]
    strength = 5.0 + 0.1 * dimension
    shares = weights * shares
    means, roots = [], []
    for share in shares:
        belongs = share > _NEGLIGIBLE
        x, own_score, weight = position[belongs], score[belongs], share[belongs]
        unit = _unit(x, own_score, weight)
        mean, covariance = _moments(x / unit, weight, strength)
        mean_score, score_covariance = _moments(own_score * unit, weight, strength)
        between = geometric_mean(covariance, score_covariance)
        trusted = float(weight.sum() / (weight.sum() + strength))
        means.append(unit * (mean + trusted * (between @ mean_score)))
        roots.append(unit[:, None] * torch.linalg.cholesky(between))
    total = shares.sum(1)
    log_shares = (total / total.sum()).clamp(min=_LEAST_SHARE).log()
    return GaussianMixture(log_shares, torch.stack(means), torch.stack(roots))


def _unit(position: Tensor, score: Tensor, weight: Tensor) -> Tensor:
    """Of each coordinate, by the spread of draws and of scores, ``(dimension,)``."""
    spread, steepness = (
        weight @ (part - weight @ part / weight.sum().clamp(min=_LEAST)).square() + _LITTLE
        for part in (position, score)
    )
    return (spread / steepness) ** 0.25


def _moments(x: Tensor, weight: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """Mean, and covariance drawn towards the identity by as many draws as ``strength`` says."""
    total = weight.sum()
    mean = weight @ x / total.clamp(min=_LEAST)
    centred = x - mean
    spread = (weight[:, None] * centred).mT @ centred
    return mean, (spread + strength * torch.eye(x.shape[-1]).to(x)) / (total + strength)


def geometric_mean(covariance: Tensor, score_covariance: Tensor) -> Tensor:
    """The matrix S with ``S @ score_covariance @ S == covariance``; all positive definite.

    Example:
        >>> a, b = torch.diag(torch.tensor([4.0, 9.0])), torch.eye(2)
        >>> geometric_mean(a, b).diag()
        tensor([2., 3.])
    """
    values, vectors = torch.linalg.eigh(score_covariance)
    values = values.clamp(min=_LEAST)
    root = (vectors * values.sqrt()) @ vectors.mT
    inverse = (vectors * values.rsqrt()) @ vectors.mT
    values, vectors = torch.linalg.eigh(root @ covariance @ root)
    inner = (vectors * values.clamp(min=_LEAST).sqrt()) @ vectors.mT
    result = inverse @ inner @ inverse
    return 0.5 * (result + result.mT)
