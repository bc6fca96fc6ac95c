"""What a population says of itself: whether it had arrived at the posterior as it moves on."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import AnnealedSampler
from tests.helpers.densities import many_well, normal, of_density, two_modes
from tests.helpers.kinds import long_but
from tests.helpers.zoo import eight_schools_noncentred

SEEDS = pytest.mark.parametrize("seed", [0, 1, 2])
Y = torch.tensor([1.2, -0.3, 2.0, 0.4, 0.9], dtype=torch.float64)


def funnel(x):
    """Of ten dimensions, as a density, which is normalised."""
    v, others = x[0], x[1:]
    spread = dist.Normal(0.0, (0.5 * v).exp())
    return dist.Normal(0.0, 3.0).log_prob(v) + spread.log_prob(others).sum()


def conjugate():
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(Y)):
        pyro.sample("y", dist.Normal(mean, 1.0), obs=Y)


def logistic():
    features = torch.linspace(-2.0, 2.0, 60).reshape(20, 3).sin()
    weights = pyro.sample("weights", normal(3, 2.0))
    with pyro.plate("data", 20):
        logits = features @ weights
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=(features[:, 0] > 0.1).double())


def run(model, seed, **settings):
    sampler = AnnealedSampler(model, seed=seed, **settings)
    sampler.run()
    return sampler


@pytest.mark.parametrize("width", long_but([3.0], [3.0, 10.0]))
def test_a_funnel_as_a_bare_density_is_told(width):
    """With 44 of 50 seeds; the evidence is wrong by more than parts of a population differ."""
    told = [run(of_density(normal(10, width), funnel), seed) for seed in range(3)]
    told = [sampler for sampler in told if sampler.population.drift.matters]
    assert len(told) > 1
    for sampler in told:
        assert sampler.log_evidence < -0.3  # the truth is zero
        parts = replace(sampler.population, drift=None).log_evidence_error
        assert 2.0 * parts < abs(sampler.log_evidence) < 2.0 * sampler.log_evidence_error
        assert "its mean log density against the start's changed by" in sampler.message
        assert "`pyro.sample`" in sampler.message and "`num_moves`" in sampler.message
        assert sampler.message.count(". ") == 0


@pytest.mark.parametrize(
    ("model", "seed"),
    long_but(
        lambda case: case[1] == 0,
        itertools.product([conjugate, eight_schools_noncentred, many_well(3), logistic], range(3)),
    ),
)
def test_populations_that_have_arrived_are_told_nothing(model, seed):
    assert_arrived(run(model, seed))


@pytest.mark.slow
@SEEDS
def test_a_population_in_two_modes_has_arrived(seed):
    assert_arrived(run(two_modes(16), seed))


def assert_arrived(sampler):
    drift = sampler.population.drift
    assert not drift.matters
    assert abs(drift.change) < 3.5 * drift.noise
    assert sampler.message.startswith("The parts of the population agree")


@pytest.mark.slow
def test_drifts_vary_as_much_as_their_noise_says():
    drifts = [run(conjugate, seed, num_particles=200).population.drift for seed in range(30)]
    scores = torch.tensor([drift.change / drift.noise for drift in drifts])
    assert 0.5 < float(scores.square().mean().sqrt()) < 1.5
    assert abs(float(scores.mean())) < 4.0 / 30**0.5
