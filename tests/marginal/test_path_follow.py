"""How a path's Gaussian follows the parameters, as the user says or as warm-up finds."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.proposals.path import FOLLOWING, PathParticle
from pyro_hamflow.marginal.refit import refit_at
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.estimates import assert_unbiased, estimates
from tests.helpers.paths import Y, filtered, kalman, one_by_one, returns, vector, volatility

COUNTS = (2.0 + 1.5 * torch.arange(24.0, dtype=torch.float64).mul(0.3).sin()).exp().round()


def at(**values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def counts(y):
    """A random walk of log rates about a level, which is no part of the walk's prior."""
    one = torch.ones((), dtype=torch.float64)
    scale = pyro.sample("scale", dist.HalfNormal(one))
    level = pyro.sample("level", dist.Normal(0.0, 2.0 * one))
    with pyro.plate("time", len(y)):
        step = pyro.sample("step", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Poisson((level + step.cumsum(-1)).exp()), obs=y)


@pytest.mark.parametrize("follow", FOLLOWING)
def test_each_way_to_follow_is_exact_where_all_is_gaussian(follow):
    """Also where the likelihood has a parameter, which is elsewhere than at the pilot."""
    marginal = marginalize(vector, ["x"], num_particles=1, follow=follow)
    marginal.fit(Y, pilot=at(phi=0.8, s=0.5, r=0.6))
    phi, s, r = 0.5, 0.3, 0.9
    found = repeated_estimates(marginal, at(phi=phi, s=s, r=r), 3, Arguments((Y,), {}))
    first, one = one_by_one(s**2 / (1 - phi**2)), torch.ones(1, dtype=torch.float64)
    exact = kalman(Y, one_by_one(phi), one_by_one(s**2), first, one, r)
    assert (found - exact).abs().max() < 1e-10


@pytest.mark.parametrize("follow", FOLLOWING)
def test_each_way_to_follow_is_unbiased(follow, monkeypatch):
    y = returns(20)
    marginal = marginalize(volatility, ["x"], num_particles=2, follow=follow)
    marginal.fit(y, pilot=at(phi=0.9, s=0.4))
    away = {"phi": 0.6, "s": 0.7}

    def check():
        torch.manual_seed(0)
        assert_unbiased(estimates(marginal, at(**away), y)["x"], filtered(y, **away))

    check()
    mix = PathParticle.mix
    monkeypatch.setattr(
        PathParticle,
        "mix",
        lambda p, ratios: (mix(p, ratios)[0] + 0.1 * p.path.square().mean(-1), None),
    )
    with pytest.raises(AssertionError):
        check()


def variance(follow, away):
    """That of the log estimate at parameters away from the pilot."""
    marginal = marginalize(counts, ["step"], num_particles=1, follow=follow)
    marginal.fit(COUNTS, pilot=at(scale=0.4, level=1.0))
    torch.manual_seed(0)
    return float(repeated_estimates(marginal, away, 200, Arguments((COUNTS,), {})).var())


def test_each_way_follows_closer_than_the_one_before():
    """Held, the likelihood holds its level; to first order, the path's curve is missed."""
    level, scale = at(scale=0.4, level=1.4), at(scale=0.15, level=1.0)
    assert variance("prior", level) > 100 * variance("linear", level)
    assert variance("linear", scale) > 2 * variance("newton", scale)


def test_what_a_user_has_said_stays_and_is_fitted_anew():
    y, pilot, away = returns(200), at(phi=0.5, s=1.2), at(phi=0.97, s=0.15)
    data, chosen = Arguments((y,), {}), {}
    for follow in ("auto", "prior", "newton"):
        marginal = marginalize(volatility, ["x"], num_particles=1, follow=follow)
        marginal.fit(y, pilot=pilot)
        for word, centre in (("near", pilot), ("there", away)):
            found = refit_at(marginal, centre, [away], data)
            chosen[follow, word] = found and found.proposal.steps
    assert chosen["auto", "near"] == 1
    assert (chosen["prior", "near"], chosen["prior", "there"]) == (None, 0)
    assert chosen["newton", "near"] in (None, 2)


def test_a_likelihood_with_parameters_is_held_only_if_the_user_says_so():
    taken = {}
    for follow in ("auto", *FOLLOWING):
        marginal = marginalize(counts, ["step"], num_particles=1, follow=follow)
        marginal.fit(COUNTS, pilot=at(scale=0.4, level=1.0))
        (fit,) = marginal.proposal.fitted.values()
        taken[follow] = fit.steps
    assert taken == {"auto": 1, "prior": 0, "linear": 1, "newton": 2}


def effects(y):
    with pyro.plate("group", len(y)):
        x = pyro.sample("x", dist.Normal(pyro.sample("mean", dist.Normal(0.0, 1.0)), 1.0))
        pyro.sample("y", dist.Poisson(x.exp()), obs=y)


@pytest.mark.parametrize("proposal", ["auto", "laplace"])
def test_numbers_that_are_no_path_have_one_way_to_follow(proposal):
    marginal = marginalize(effects, ["x"], proposal=proposal, follow="newton")
    with pytest.raises(ValueError, match=r"'newton', and \['x'\] are no path.* expected 'auto'"):
        marginal(torch.tensor([1.0, 0.0]))
    marginalize(effects, ["x"], proposal=proposal, follow="auto")(torch.tensor([1.0, 0.0]))
