"""Mixtures of Gaussians, fitted to draws together with the gradients of their log density."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24)  # of components that are tried
_GAIN = 0.03  # of the mean held-out log density, for which more components are taken
_PATIENCE = 2  # counts in turn that bring no gain, before the search ends
_PASSES = 10  # of the search for centres, and of the search for a count
_FINAL_PASSES = 20
_NEGLIGIBLE = 1e-4  # share of a draw that a component may leave out of its moments
_LEAST_SHARE = 1e-3
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
    """A mixture with as many components as the held-out log density asks for.

    Arguments:
        position: Draws in coordinates where they are about standard, ``(draws, dimension)``.
        score: The gradient of their log density, of the same shape.
        weights: Of the draws, ``(draws,)``; their mean is one.
        held_out: Which draws judge the number of components, ``(draws,)``, true or false.

    Example:
        >>> x = torch.randn(500, 2)
        >>> held_out = torch.arange(500) % 4 == 0
        >>> fit_mixture(x, -x, torch.ones(500), held_out).num_components
        1
    """
    kept = ~held_out
    most = max(1, int(kept.sum()) // (2 * position.shape[-1]))
    best_count, best, waited = 1, -math.inf, 0
    for count in [count for count in _COUNTS if count <= most]:
        mixture = _maximise(position[kept], score[kept], weights[kept], count, _PASSES)
        log_density = mixture.log_density(position[held_out])
        measured = float((weights[held_out] * log_density).sum() / weights[held_out].sum())
        if measured > best + _GAIN:
            best_count, best, waited = count, measured, 0
        else:
            waited += 1
            if waited == _PATIENCE:
                break
    tries = [_maximise(position, score, weights, best_count, _FINAL_PASSES) for _ in range(2)]
    return max(tries, key=lambda one: float((weights * one.log_density(position)).sum()))


def _maximise(
    position: Tensor, score: Tensor, weights: Tensor, count: int, passes: int
) -> GaussianMixture:
    """Expectation and maximisation in turn, from the clusters around centres far apart."""
    nearest = torch.cdist(position, _centres(position, weights, count)).argmin(1)
    shares = torch.nn.functional.one_hot(nearest, count).mT.to(position)
    for _ in range(passes):
        mixture = _from_shares(position, score, weights * shares)
        if count == 1:
            break
        updated = mixture.log_parts(position).softmax(0)
        change = float((updated - shares).abs().mean())
        shares = updated
        if change < 1e-3 / count:
            break
    return mixture


def _centres(position: Tensor, weights: Tensor, count: int) -> Tensor:
    """Centres of clusters: draws far apart, and then means of those that are nearest to each."""
    centres = position[torch.multinomial(weights, 1)]
    for _ in range(count - 1):
        distance = torch.cdist(position, centres).amin(1).square() * weights + _LEAST
        centres = torch.cat([centres, position[torch.multinomial(distance, 1)]])
    for _ in range(_PASSES if count > 1 else 0):
        nearest = torch.cdist(position, centres).argmin(1)
        belongs = weights * torch.nn.functional.one_hot(nearest, count).mT.to(position)
        total = belongs.sum(1, keepdim=True)
        centres = torch.where(total > 0, (belongs @ position) / total.clamp(min=_LEAST), centres)
    return centres


def _from_shares(position: Tensor, score: Tensor, shares: Tensor) -> GaussianMixture:
    """Components by the moments of draws and scores that belong to each, ``(components, draws)``.

    For a Gaussian of covariance S the draws' covariance is S, the scores' is its inverse, and the
    mean is where the score is zero. From few draws S is told best by both, as the matrix that takes
    the one into the other; both are first drawn towards the identity, as if a few draws more had
    it.
    """
    dimension = position.shape[-1]
    strength = 5.0 + 0.1 * dimension
    means, roots = [], []
    for share in shares:
        belongs = share > _NEGLIGIBLE
        weight = share[belongs]
        mean, covariance = _moments(position[belongs], weight, strength)
        mean_score, score_covariance = _moments(score[belongs], weight, strength)
        between = geometric_mean(covariance, score_covariance)
        trusted = float(weight.sum() / (weight.sum() + strength))
        means.append(mean + trusted * (between @ mean_score))
        roots.append(torch.linalg.cholesky(between))
    total = shares.sum(1)
    log_shares = (total / total.sum()).clamp(min=_LEAST_SHARE).log()
    return GaussianMixture(log_shares, torch.stack(means), torch.stack(roots))


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
