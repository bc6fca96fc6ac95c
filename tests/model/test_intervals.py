"""Supports with infinite ends, as that of Pyro's generalised Pareto variables."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to, constraints

from pyro_hamflow import MCMC, NUTS
from pyro_hamflow.model.intervals import UnboundedInterval, map_onto
from tests.helpers.laws import LIMIT, scores

INF = torch.inf


def pareto(concentration):
    return dist.GeneralizedPareto(1.0, 2.0, torch.as_tensor(concentration))


def posterior_mean(concentration):
    """By quadrature, of what is seen once with normal noise."""
    x = torch.linspace(1.0, 40.0, 400_001, dtype=torch.float64)
    prior = dist.GeneralizedPareto(*torch.tensor([1.0, 2.0, concentration]).double())
    inside = prior.support.check(x)
    x = x[inside]
    weight = (prior.log_prob(x) + dist.Normal(x, 2.0).log_prob(torch.tensor(3.0))).exp()
    return float((weight * x).sum() / weight.sum())


@pytest.mark.parametrize("concentration", [[0.3], [-0.4], [0.3, -0.4]])
def test_a_generalised_pareto_variable_has_its_posterior(concentration):
    def model():
        x = pyro.sample("x", pareto(concentration).to_event(1))
        pyro.sample("y", dist.Normal(x, 2.0).to_event(1), obs=torch.full_like(x, 3.0))

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=200, warmup_steps=150, num_chains=16)
    mcmc.run()
    assert mcmc.kernel.potential.programs.fallback_reason is None
    draws = mcmc.get_samples(group_by_chain=True)["x"].double().numpy()
    truths = torch.tensor([posterior_mean(part) for part in concentration]).numpy()
    assert (abs(scores(draws, truths)) < LIMIT).all()


ENDS = {
    "above": (1.5, INF, constraints.greater_than_eq(1.5)),
    "below": (-INF, 1.5, constraints.less_than(1.5)),
    "line": (-INF, INF, constraints.real),
    "between": (-1.0, 2.0, constraints.interval(-1.0, 2.0)),
}


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("kind", [constraints.interval, constraints.half_open_interval])
def test_each_end_may_be_infinite(ends, kind):
    """Also beside elements whose ends are finite, and where these ones' numbers overflow."""
    lower, upper, other = ENDS[ends]
    support = kind(torch.tensor([lower, 0.0]), torch.tensor([upper, INF]))
    transform, expected = map_onto(support), biject_to(other)
    assert isinstance(transform, UnboundedInterval)
    x = torch.linspace(-5.0, 5.0, 11, dtype=torch.float64)
    both = torch.stack([x, torch.zeros_like(x)], -1)
    y = transform(both)
    assert torch.allclose(y[:, 0], expected(x))
    assert torch.allclose(transform.inv(y), both)
    slopes = expected.log_abs_det_jacobian(x, expected(x))
    assert torch.allclose(transform.log_abs_det_jacobian(both, y)[:, 0], slopes)
    far = torch.tensor([1000.0 * (ends in ("line", "between")), 0.0], requires_grad=True)
    (slope,) = torch.autograd.grad(transform(far).sum(), far)
    assert bool(slope.isfinite().all())
    finite = constraints.interval(0.0, torch.tensor(1.0))
    assert not isinstance(map_onto(finite), UnboundedInterval)
