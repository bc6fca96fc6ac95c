"""Vectors of which the model gives the covariance: their proposal is that of the precision."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.path_covariance import map_at
from pyro_hamflow.marginal.path_fit import gaussian_at
from pyro_hamflow.marginal.proposals.path import FOLLOWING
from pyro_hamflow.marginal.whitening.affine import CovariancePrior
from pyro_hamflow.programs import banded, large_factors
from tests.helpers.estimates import assert_unbiased, estimates

X = torch.linspace(0.0, 6.0, 24, dtype=torch.float64)
CLASSES = (X.sin() > 0.0).double()
PILOT = {"height": torch.tensor(1.5, dtype=torch.float64)}
AWAY = {"height": torch.tensor(2.0, dtype=torch.float64)}


def covariance(height, x):
    gaps = x[:, None] - x
    return height**2 * (-0.5 * gaps.square()).exp() + 1e-2 * torch.eye(len(x)).to(x)


def classes(y, x=X, scale=1.0):
    height = pyro.sample("height", dist.LogNormal(0.5 * torch.ones_like(x[0]), 0.7))
    prior = dist.MultivariateNormal(0.1 * x, covariance(height, x))
    with pyro.poutine.scale(scale=scale):
        f = pyro.sample("f", prior)
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)


def neighbours(y):
    """A likelihood that looks at two numbers at once."""
    height = pyro.sample("height", dist.LogNormal(0.5 * torch.ones_like(y[0]), 0.7))
    f = pyro.sample("f", dist.MultivariateNormal(0.1 * X, covariance(height, X)))
    pyro.sample("y", dist.Bernoulli(logits=f + f.roll(1)).to_event(1), obs=y)


@pytest.mark.parametrize("follow", FOLLOWING)
@pytest.mark.parametrize("block", [256, 5])
def test_proposal_is_that_of_the_precision(follow, block, monkeypatch):
    monkeypatch.setattr(large_factors, "BLOCK", block)
    marginal = marginalize(classes, ["f"], num_particles=1, follow=follow)
    marginal.fit(CLASSES, pilot=PILOT)
    fit = marginal.proposal.fitted["f"]
    assert fit.by_covariance
    (programs,) = marginal.plan(CLASSES).structure.programs.values()
    parts = programs.parts_at(AWAY)
    by_precision = gaussian_at(fit, parts, AWAY)
    prior = CovariancePrior(0.1 * X, torch.linalg.cholesky(covariance(2.0, X)))
    found = map_at(fit, parts, AWAY, prior)
    none = torch.zeros_like(X)
    assert (by_precision.draw(none) - found.forward(none)).norm() < 1e-7
    columns = torch.func.jacrev(found.forward)(none)
    assert (found.pulled(X) - columns.mT @ X).norm() < 1e-9
    roots = banded.multiply_root(by_precision.root, columns.mT, transposed=True)
    assert (roots @ roots.mT - torch.eye(24)).abs().max() < 1e-7  # a rotation
    assert abs(found.log_volume() + 0.5 * banded.log_det(by_precision.root)) < 1e-7


def test_estimates_are_unbiased():
    """By many draws of the prior."""
    y, x = CLASSES[:20], X[:20]
    marginal = marginalize(classes, ["f"], num_particles=2)
    marginal.fit(y, x, pilot=PILOT)
    assert marginal.proposal.fitted["f"].by_covariance
    torch.manual_seed(0)
    found = estimates(marginal, AWAY, y, x)["f"]
    draws = dist.MultivariateNormal(0.1 * x, covariance(2.0, x)).sample((400_000,))
    weights = dist.Bernoulli(logits=draws).log_prob(y).sum(-1)
    assert_unbiased(found, weights.logsumexp(0) - math.log(len(draws)))


@pytest.mark.parametrize(
    ("model", "data"), [(classes, (CLASSES, X, 0.7)), (neighbours, (CLASSES,))]
)
def test_other_priors_and_likelihoods_go_by_their_precision(model, data):
    marginal = marginalize(model, ["f"], num_particles=1)
    marginal.fit(*data, pilot=PILOT)
    assert not marginal.proposal.fitted["f"].by_covariance
