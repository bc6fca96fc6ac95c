"""Densities with several modes or scales, as models, with their true evidence and weights."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch

WELL, POSITIVE = 10.293479707, 0.844307  # of a pair: the log evidence, P(x1 > 0)


def normal(dimension, scale):
    return dist.Normal(torch.zeros(dimension), scale).to_event(1)


def of_density(prior, log_density):
    """A model whose posterior is a density: it begins at a prior, and has that taken out again."""

    def model():
        x = pyro.sample("x", prior)
        pyro.factor("density", log_density(x) - prior.log_prob(x))

    return model


def many_well(pairs):
    def log_density(x):
        a, b = x[:pairs], x[pairs:]
        return (-(a**4) + 6.0 * a**2 + 0.5 * a).sum() - 0.5 * b.square().sum()

    return of_density(normal(2 * pairs, 2.0), log_density)


def two_modes(dimension):
    """A mixture, 1:3, of normals of variance .5 about -2.5 and 2.5."""

    def log_density(x):
        parts = [normal(dimension, 0.5**0.5).log_prob(x - m) for m in (-2.5, 2.5)]
        return torch.logaddexp(parts[0] + math.log(0.25), parts[1] + math.log(0.75))

    return of_density(normal(dimension, 5.0), log_density)
