"""Likelihoods that a Gaussian proposal fits badly, and what they integrate to by quadrature."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

GRID = torch.linspace(-12.0, 12.0, 4001, dtype=torch.float64)
HERE = {"mean": torch.tensor(0.4, dtype=torch.float64)}
Y = torch.tensor([0.8, 1.5, 0.2, 2.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.7], dtype=torch.float64)


def outliers(x):
    parts = dist.Normal(torch.stack([x, torch.zeros_like(x)], -1), torch.tensor([0.3, 5.0]))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.9, 0.1])), parts)


TERMS = {
    "square": lambda x: dist.Normal(x**2, 0.3),
    "conflict": lambda x: dist.StudentT(2.0, x, 0.3),
    "outliers": outliers,
    "counts": lambda x: dist.Poisson(x.exp()),
}


def normal(mean):
    return dist.Normal(mean, 1.0)


def mixture(mean):
    parts = dist.Normal(torch.stack([mean - 1.0, mean + 1.0]), 0.8)
    return dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts)


PRIORS = {"normal": normal, "mixture": mixture}


def one_site(prior, term):
    """A model of one effect for each datum, and the log likelihood of each by quadrature."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", prior(mean))
            pyro.sample("y", term(x), obs=y)

    joint = prior(HERE["mean"]).log_prob(GRID) + term(GRID).log_prob(data(term)[:, None])
    return model, joint.logsumexp(1) + math.log(GRID[1] - GRID[0])


def data(term):
    return Y.round() if term is TERMS["counts"] else Y


def effects_in_effects(y):
    """Two effects of each subject, of which the second is one for each visit."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        with pyro.plate("visit", 2, dim=-1):
            w = pyro.sample("w", dist.Normal(x, 0.5))
            pyro.sample("y", dist.StudentT(3.0, w, 0.5), obs=y)


def effects_in_effects_exact(y):
    grid = torch.linspace(-9.0, 11.0, 801, dtype=torch.float64)
    step = math.log(grid[1] - grid[0])
    inner = dist.Normal(grid[:, None], 0.5).log_prob(grid)  # of w, the last, given x
    terms = dist.StudentT(3.0, grid, 0.5).log_prob(y[..., None])
    visits = (inner + terms[..., None, :]).logsumexp(-1) + step
    return (dist.Normal(HERE["mean"], 1.0).log_prob(grid) + visits.sum(1)).logsumexp(-1) + step


def worst_score(log_weights, exact, resolution=0.1):
    """By how many standard errors an element's mean estimate is off."""
    ratio = (log_weights.logsumexp(1) - exact).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert error.max() < resolution, "the test has no power"
    return float(((ratio.mean(0) - 1.0).abs() / error).max())
