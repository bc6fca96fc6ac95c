"""Proposals of paths that are too narrow, which estimates from fresh noise do not show."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize
from pyro_hamflow.marginal.refit import refit_at
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.marginal.tails import NARROW, tail, told_of_tails
from pyro_hamflow.mcmc.adaptation import spread_of_estimates
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.paths import returns, volatility

X = torch.linspace(0.0, 6.0, 24, dtype=torch.float64)
CLASSES = (X.sin() > 0.0).double()
WIDE = {"height": torch.tensor(3.0, dtype=torch.float64)}


def classes(y):
    height = pyro.sample("height", dist.LogNormal(0.5 * torch.ones_like(y[0]), 0.7))
    kernel = height**2 * (-0.5 * (X[:, None] - X).square()).exp() + 1e-5 * torch.eye(24).to(X)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(X), kernel))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)


def fitted():
    marginal = marginalize(classes, ["f"], num_particles=1)
    marginal.fit(CLASSES, pilot={"height": torch.tensor(1.5, dtype=torch.float64)})
    return marginal


def apart(y):
    """States that have nothing to do with each other."""
    height = pyro.sample("height", dist.LogNormal(torch.zeros_like(y[0]), 1.0))
    matrix = height**2 * (torch.eye(24) + 1e-9).to(y)
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros_like(y), matrix))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)


def test_ratio_of_moments_is_that_of_a_single_state():
    """By sums over one state's values, with the largest weights of its posterior left out."""
    data, height = torch.ones(24, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    marginal = marginalize(apart, ["f"], num_particles=1)
    marginal.fit(data, pilot={"height": torch.tensor(1.0, dtype=torch.float64)})
    fit = marginal.proposal.fitted["f"]
    precision = fit.held.bands[0, 0] + height**-2
    centre = (fit.held.gradient[0] + fit.held.bands[0, 0] * fit.mode[0]) / precision
    u = torch.linspace(-10.0, 10.0, 4001, dtype=torch.float64)
    f = centre + (u + 1e-4 * u**5) / precision.sqrt()
    log_weight = dist.Normal(0.0, height).log_prob(f) - torch.nn.functional.softplus(-f)
    log_weight = log_weight + 0.5 * u**2 + (5e-4 * u**4).log1p()
    log_noise = (-0.5 * u**2).log_softmax(0)
    log_mean = (log_weight + log_noise).logsumexp(0)
    order = log_weight.argsort(descending=True)
    share = (log_weight + log_noise - log_mean).exp()[order]
    kept = share.cumsum(0) > 1e-4
    expected = float(((share * (log_weight - log_mean).exp()[order])[kept]).sum().log())
    assert expected > 1.0
    found = tail(marginal, [{"height": height}], Arguments((data,), {}))
    assert found == pytest.approx(expected, rel=0.1)


def test_narrow_proposals_are_found_where_estimates_vary_little():
    marginal, data = fitted(), Arguments((CLASSES,), {})
    assert repeated_estimates(marginal, WIDE, 200, data).var() < 1.0
    assert tail(marginal, [WIDE], data) > 5.0
    assert tail(marginal, [{"height": torch.tensor(1.5).double()}], data) < 0.1
    assert "['f'] is far too narrow" in str(told_of_tails(marginal, [WIDE], data))


def test_a_closer_fit_is_taken_there():
    marginal, data = fitted(), Arguments((CLASSES,), {})
    centre = {"height": torch.tensor(2.0, dtype=torch.float64)}
    better = refit_at(marginal, centre, [WIDE], data, beyond=True)
    assert better is not None
    assert better.proposal.steps > 0
    assert tail(better, [WIDE], data) < 0.2 * tail(marginal, [WIDE], data)


def test_long_paths_that_are_served_well_are_told_nothing():
    y = returns(60)
    marginal = marginalize(volatility, ["x"], num_particles=1)
    values = {"phi": torch.tensor(0.95).double(), "s": torch.tensor(0.2).double()}
    marginal.fit(y, pilot=values)
    data = Arguments((y,), {})
    assert tail(marginal, [values], data) < NARROW
    assert told_of_tails(marginal, [values], data) is None


def test_warm_up_ends_where_the_posterior_reaches_no_place_beyond_the_chains(monkeypatch):
    """As it does not in many dimensions, where all places a little further out have no mass."""
    monkeypatch.setattr(spread_of_estimates, "_REACH", -float("inf"))
    kernel = PseudoMarginalNUTS(marginalize(volatility, ["x"]))
    mcmc = MCMC(kernel, 10, 40, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(returns(12))
    assert mcmc.get_samples()["phi"].shape == (20,)
