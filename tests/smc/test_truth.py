"""Evidence and weights of modes against closed forms and quadrature."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import AnnealedSampler, marginalize
from tests.helpers.densities import POSITIVE, WELL, many_well, normal, two_modes
from tests.helpers.evidence import assert_evidence, share
from tests.helpers.exact_draws import SLOPE, Y, latent


def run(model, *args, seed=0, **settings):
    sampler = AnnealedSampler(model, seed=seed, **settings)
    sampler.run(*args)
    return sampler


def rosenbrock():
    """Five pairs, uniform between -10 and 10."""
    x = pyro.sample("x", dist.Uniform(torch.full((10,), -10.0), 10.0).to_event(1))
    a, b = x[0::2], x[1::2]
    pyro.factor("f", -(10.0 * (a.square() - b).square() + (a - 1.0).square()).sum())


def rosenbrock_evidence():
    a = np.linspace(-10.0, 10.0, 20_001)
    ends = [math.sqrt(10.0) * (b - a**2) for b in (-10.0, 10.0)]
    erf = [torch.erf(torch.as_tensor(end)).numpy() for end in ends]
    inner = np.exp(-((a - 1.0) ** 2)) * math.sqrt(math.pi / 10.0) * 0.5 * (erf[1] - erf[0])
    return 5.0 * math.log(inner.sum() * 1e-3) - 10.0 * math.log(20.0)


@pytest.mark.slow
def test_rosenbrock():
    sampler = run(rosenbrock, num_particles=4000)
    assert_evidence(sampler.population, rosenbrock_evidence(), 0.1)


def funnel(y):
    v = pyro.sample("v", dist.Normal(0.0, 3.0))
    with pyro.plate("nine", 9):
        x = pyro.sample("x", dist.Normal(0.0, (0.5 * v).exp()))
        if y is not None:
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_a_funnel_without_data_has_evidence_one():
    sampler = run(funnel, None)
    assert abs(sampler.log_evidence) < 1e-9
    variance = float(sampler.mean(sampler.position[:, 0].square()))
    assert abs(variance - 9.0) < 4.0 * 9.0 * math.sqrt(2.0 / 2000)


@pytest.mark.slow
def test_a_funnel_with_data():
    y = torch.tensor([0.3, -1.2, 0.8, 2.0, -0.4, 0.1, -0.9, 1.1, 0.5])
    v = torch.linspace(-24.0, 24.0, 20_001)
    log_joint = dist.Normal(0.0, 3.0).log_prob(v)
    log_joint = log_joint + dist.Normal(0.0, (v.exp() + 1.0).sqrt()[:, None]).log_prob(y).sum(-1)
    expected = float(log_joint.logsumexp(0)) + math.log(48.0 / 20_000)
    sampler = run(funnel, y, num_particles=4000)
    assert_evidence(sampler.population, expected, 0.1)
    found, error = share(sampler.population, (sampler.position[:, 0] < 0.0).double())
    assert abs(found - float(log_joint.softmax(0)[v < 0.0].sum())) < 3.0 * error


@pytest.mark.slow
def test_many_well_in_32_dimensions():
    sampler = run(many_well(16), num_particles=16_000)
    assert_evidence(sampler.population, 16 * WELL, 0.1)
    for pair in range(16):
        found, error = share(sampler.population, (sampler.position[:, pair] > 0.0).double())
        assert abs(found - POSITIVE) < 3.5 * error  # of sixteen
        assert error < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("dimension", [16, 64])
def test_weights_of_two_modes(dimension):
    sampler = run(two_modes(dimension), num_particles=6000)
    assert_evidence(sampler.population, 0.0, 0.1)
    found, error = share(sampler.population, (sampler.position.sum(-1) < 0.0).double())
    assert abs(found - 0.25) < 3.0 * error
    assert error < 0.03


def latent_evidence():
    """Of the model with binary answers and an effect each, on a grid."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    nodes, weights = torch.as_tensor(nodes), torch.as_tensor(weights / weights.sum())
    mean, log_scale = torch.linspace(-6.0, 6.0, 301), torch.linspace(-5.0, 5.0, 301)
    x = mean[:, None, None] + log_scale.exp()[:, None] * nodes
    yes = (torch.sigmoid(SLOPE * x) * weights).sum(-1)
    likelihood = yes ** Y.sum() * (1.0 - yes) ** (len(Y) - Y.sum())
    prior = dist.Normal(0.0, 1.0).log_prob(mean).exp()[:, None]
    prior = prior * dist.Normal(0.0, 0.7).log_prob(log_scale).exp()
    return float((prior * likelihood).sum().log()) + math.log(12.0 / 300 * 10.0 / 300)


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_an_estimated_likelihood_against_quadrature(proposal):
    marginal = marginalize(latent, ["x"], num_particles=4, proposal=proposal)
    sampler = run(marginal, Y, seed=1)
    assert_evidence(sampler.population, latent_evidence(), 0.05)


def test_priors_carry_the_scale_of_a_normal_model():
    """Normal coefficients and noise: the evidence is that of a multivariate normal."""
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(3))
    y = x @ torch.tensor([1.0, -0.5, 0.2]) + 0.1

    def regression(x, y):
        beta = pyro.sample("beta", normal(3, 2.0))
        pyro.sample("y", dist.Normal(x @ beta, 0.7).to_event(1), obs=y)

    covariance = 0.49 * torch.eye(12) + 4.0 * x @ x.mT
    expected = float(dist.MultivariateNormal(torch.zeros(12), covariance).log_prob(y))
    assert_evidence(run(regression, x, y).population, expected, 0.05)
