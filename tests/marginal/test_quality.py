"""What an estimate is said to be worth, against what it is worth."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf


def counts(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


Y = torch.tensor([2.0, 0.0, 1.0, 5.0, 3.0, 0.0, 1.0, 7.0], dtype=torch.float64)
HERE = {"mean": torch.tensor(0.3, dtype=torch.float64)}


def quality(num_particles, points="iid", replicates=2000):
    marginal = phf.marginalize(
        counts, ["x"], num_particles=num_particles, proposal="prior", points=points
    )
    return phf.estimator_quality(marginal, HERE, Y, num_replicates=replicates)


def exact_relative_variance(y: float) -> float:
    """Var(L) / E(L)^2 of a single particle's likelihood, by quadrature."""
    x = torch.linspace(-9, 10, 20001)
    density = torch.exp(-0.5 * (x - HERE["mean"]) ** 2) / math.sqrt(2 * math.pi)
    likelihood = torch.exp(dist.Poisson(x.exp()).log_prob(torch.tensor(y)))
    mean = torch.trapezoid(density * likelihood, x)
    return float(torch.trapezoid(density * likelihood**2, x) / mean**2 - 1.0)


def test_standard_deviation_matches_the_delta_method():
    expected = math.sqrt(sum(exact_relative_variance(float(y)) for y in Y) / 512)
    found = quality(512).standard_deviation
    # 2,000 replicates know a standard deviation to 1.6 per cent; the delta method errs by O(1/N).
    assert abs(found / expected - 1.0) < 4 * 0.016 + 0.02


@pytest.mark.parametrize("points", ["iid", "rqmc"])
def test_suggested_particles_bring_the_variance_near_one(points):
    start = quality(8 if points == "iid" else 2, points)
    again = quality(max(2, start.suggested_num_particles), points)
    assert start.standard_deviation**2 > 1.0
    assert 0.3 < again.standard_deviation**2 < 1.7


def test_worst_element_is_part_of_the_whole():
    found = quality(8)
    assert found.standard_deviation / math.sqrt(len(Y)) < found.worst_element
    assert found.worst_element < found.standard_deviation


def test_heavy_tails_of_weights_are_told():
    """Particles from a third of the prior's width have weights without a variance: k is 0.89."""

    def narrow(parameters, y):
        with pyro.plate("group", len(y)):
            pyro.sample("x", dist.Normal(parameters["mean"], 0.33))

    def silent(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(x, 50.0), obs=y)

    marginal = phf.marginalize(silent, ["x"], num_particles=8, proposal=narrow)
    heavy = phf.estimator_quality(marginal, HERE, Y, num_replicates=2).max_pareto_k
    assert quality(8, replicates=2).max_pareto_k < 0.7 < heavy


def test_bad_input_is_named():
    marginal = phf.marginalize(counts, ["x"], num_particles=4)
    with pytest.raises(ValueError, match="lacks a value for site 'mean'"):
        phf.estimator_quality(marginal, {}, Y)
    with pytest.raises(ValueError, match="`num_replicates` is 1: expected 2 or more"):
        phf.estimator_quality(marginal, HERE, Y, num_replicates=1)


def test_particles_are_settled_by_the_variance():
    """Two where they suffice; more where they do not; anew for other data."""
    marginal = phf.marginalize(counts, ["x"], proposal="laplace")
    marginal.pilot((Y,), {})
    assert marginal.plan(Y).layouts["x"].num_particles == 2
    many = Y.repeat(200)
    marginal.pilot((many,), {})
    found = marginal.plan(many).layouts["x"].num_particles
    assert found > 2
    here = marginal.pilot((many,), {})
    assert phf.estimator_quality(marginal, here, many).standard_deviation < 1.3 or found == 16


def test_given_particles_are_kept():
    marginal = phf.marginalize(counts, ["x"], num_particles=5, proposal="laplace")
    marginal.pilot((Y,), {})
    assert marginal.plan(Y).layouts["x"].num_particles == 5
