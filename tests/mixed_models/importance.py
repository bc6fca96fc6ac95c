"""Moments of a posterior whose density is known, by importance sampling.

Draws come first from a t-distribution at the mode, then from a mixture of t-distributions around
draws of the round before, so that skewed posteriors are covered; a share of them around draws of
the square root of the posterior, for long tails, as logarithms of scales near zero have. Pareto's k
and the effective sample size say whether that is enough.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import arviz
import numpy as np
import scipy.optimize
import scipy.stats
import torch

from tests.mixed_models.quadrature import NODES, Marginal

WANTED_ESS = 20_000
LARGEST_PARETO_K = 0.5
_CENTRES = 200
_FREEDOM = 4  # of the t-distributions
_ROUNDS = 3
_APART = 0.2
_TRIALS, _DRAWS, _BATCHES = 3000, 10_000, 60


@dataclass(frozen=True)
class Reference:
    """A posterior's moments, of unconstrained values, the first two with their standard errors."""

    names: list[str]
    mean: list[float]
    sd: list[float]
    kurtosis: list[float]
    mean_error: list[float]
    sd_error: list[float]
    ess: float
    pareto_k: float
    num_draws: int
    quadrature_error: float


def find_mode(marginal: Marginal, start: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The posterior's mode, and the inverse of the curvature there."""
    size = len(marginal.truth.names)

    def energy(point: np.ndarray) -> tuple[float, np.ndarray]:
        free = torch.as_tensor(point)[None].requires_grad_()
        value = -marginal.log_posterior(free).sum()
        (gradient,) = torch.autograd.grad(value, free)
        if not (value.isfinite() and gradient.isfinite().all()):
            return 1e300, np.zeros(size)
        return value.item(), gradient[0].numpy()

    start = np.zeros(size) if start is None else start
    found = scipy.optimize.minimize(energy, start, jac=True, method="BFGS", options={"gtol": 1e-4})
    step = 1e-4
    rows = [
        (energy(found.x + step * unit)[1] - energy(found.x - step * unit)[1]) / (2 * step)
        for unit in np.eye(size)
    ]
    curvature = 0.5 * (np.array(rows) + np.array(rows).T)
    values, vectors = np.linalg.eigh(curvature)
    return found.x, vectors @ np.diag(1 / values.clip(1e-4)) @ vectors.T


class Mixture:
    """Equal shares of t-distributions of one scale around given centres, and one apart."""

    def __init__(
        self, centres: np.ndarray, scale: np.ndarray, apart: Mixture | None = None
    ) -> None:
        self.centres = centres
        self.apart = apart
        self.root = np.linalg.cholesky(scale)
        self.standard = scipy.stats.multivariate_t(
            np.zeros(len(scale)), np.eye(len(scale)), df=_FREEDOM
        )

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        which = rng.integers(len(self.centres), size=count)
        draws = self.standard.rvs(count, random_state=rng).reshape(count, -1)
        draws = self.centres[which] + draws @ self.root.T
        if self.apart is not None:
            other = self.apart.draw(count, rng)
            draws = np.where(rng.random((count, 1)) < _APART, other, draws)
        return draws

    def log_density(self, points: np.ndarray) -> np.ndarray:
        inverse = np.linalg.inv(self.root).T
        scaled, centres = points @ inverse, self.centres @ inverse
        size = points.shape[1]
        square = np.maximum(
            (scaled**2).sum(1)[:, None] + (centres**2).sum(1) - 2 * scaled @ centres.T, 0.0
        )
        at_zero = self.standard.logpdf(np.zeros(size))
        logs = at_zero - 0.5 * (_FREEDOM + size) * np.log1p(square / _FREEDOM)
        log_density = np.logaddexp.reduce(logs, axis=1) - math.log(len(self.centres))
        log_density -= np.log(np.diag(self.root)).sum()
        if self.apart is not None:
            other = self.apart.log_density(points)
            log_density = np.logaddexp(log_density + math.log1p(-_APART), other + math.log(_APART))
        return log_density


def posterior(marginal: Marginal, start: np.ndarray | None = None, seed: int = 0) -> Reference:
    """The posterior's moments by importance sampling.

    Raises:
        RuntimeError: If the proposal does not serve: too few effective draws, or Pareto's k above
            one half.
    """
    rng = np.random.default_rng(seed)
    mode, covariance = find_mode(marginal, start)
    proposal = Mixture(mode[None], 1.3 * covariance)
    for _ in range(_ROUNDS):
        draws, log_weights, logs = _weigh(marginal, proposal, _TRIALS, rng)
        tails = _around(draws, log_weights - 0.5 * logs, rng)
        proposal = _around(draws, log_weights, rng, tails)
    parts = []
    for _ in range(_BATCHES):
        parts.append(_weigh(marginal, proposal, _DRAWS, rng))
        draws = np.concatenate([part[0] for part in parts])
        log_weights = np.concatenate([part[1] for part in parts])
        weights = _normalised(log_weights)
        ess = 1 / (weights**2).sum()
        if ess >= WANTED_ESS:
            break
    with np.errstate(over="ignore"):  # of weights that go to zero there
        pareto_k = float(arviz.psislw(log_weights)[1])
    if ess < WANTED_ESS or pareto_k > LARGEST_PARETO_K:
        raise RuntimeError(f"{ess:.0f} effective draws of {len(draws)}, Pareto k {pareto_k:.2f}")
    mean = weights @ draws
    square = (draws - mean) ** 2
    variance = weights @ square
    mean_error = np.sqrt((weights**2) @ square)
    sd_error = np.sqrt((weights**2) @ (square - variance) ** 2) / (2 * np.sqrt(variance))
    return Reference(
        marginal.truth.names,
        mean.tolist(),
        np.sqrt(variance).tolist(),
        (weights @ square**2 / variance**2).tolist(),
        mean_error.tolist(),
        sd_error.tolist(),
        float(ess),
        pareto_k,
        len(draws),
        _quadrature_error(marginal, draws[rng.choice(len(draws), 8, p=weights)]),
    )


def _quadrature_error(marginal: Marginal, draws: np.ndarray) -> float:
    """By how much twice the nodes change the log-likelihood's differences, at some draws."""
    finer = replace(marginal, nodes=2 * NODES[marginal.truth.dimension], start=[])
    change = _log_likelihood(finer, draws) - _log_likelihood(marginal, draws)
    return float(np.abs(change - change.mean()).max())


def _around(
    draws: np.ndarray,
    log_weights: np.ndarray,
    rng: np.random.Generator,
    apart: Mixture | None = None,
) -> Mixture:
    """A mixture around weighted draws, of a kernel's width."""
    weights, size = _normalised(log_weights), draws.shape[1]
    centres = draws[rng.choice(len(draws), _CENTRES, p=weights)]
    spread = np.cov(draws.T, aweights=weights).reshape(size, size)
    width = 0.9 * _CENTRES ** (-1 / (4 + size))
    return Mixture(centres, width**2 * spread, apart)


def _weigh(
    marginal: Marginal, proposal: Mixture, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws, the logarithms of their weights, and of the posterior's density."""
    draws = proposal.draw(count, rng)
    logs = marginal.truth.log_prior(torch.as_tensor(draws)).numpy()
    logs = logs + _log_likelihood(marginal, draws)
    logs = np.where(np.isfinite(logs), logs, -1e300)
    return draws, logs - proposal.log_density(draws), logs


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def _log_likelihood(marginal: Marginal, draws: np.ndarray) -> np.ndarray:
    return marginal.log_likelihood(torch.as_tensor(draws)).detach().numpy()
