"""A Gaussian proposal is defended by the prior: unbiased, of bounded weights, nothing missed."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal import estimator as estimator_module
from pyro_hamflow.marginal.noise_layout import PRIOR_SHARE, Layout
from tests.helpers.hard_terms import (
    HERE,
    PRIORS,
    TERMS,
    Y,
    data,
    effects_in_effects,
    effects_in_effects_exact,
    normal,
    one_site,
    worst_score,
)
from tests.helpers.kinds import long_but


def estimates(model, sites, y, num_particles, points="iid", replicates=20_000):
    """Log estimates of each element, many at once, and their weights and local values."""
    marginal = phf.marginalize(
        model, sites, num_particles=num_particles, proposal="laplace", points=points
    )
    marginal.fit(y, pilot={"mean": torch.tensor(0.0).double()})
    plan = marginal.plan(y)
    group = plan.structure.groups[0]
    layout = plan.layouts[group.name]
    noise = torch.randn(replicates, *layout.noise_shape(group), dtype=torch.float64)

    def one(u):
        found = marginal.estimate(group, u, HERE, y)
        return found.log_weights, found.values

    with torch.no_grad(), marginal.hold(plan.structure), pyro.validation_enabled(False):
        log_weights, values = torch.func.vmap(one, chunk_size=2000)(noise)
    return log_weights.flatten(2), values, layout


@pytest.mark.parametrize(
    ("term", "prior", "num_particles", "points"),
    long_but(
        lambda case: case[2:] in ((16, "iid"), (4, "rqmc")),
        itertools.product(TERMS, PRIORS, [4, 16], ["iid", "rqmc"]),
    ),
)
def test_no_mode_is_missed_on_average(term, prior, num_particles, points):
    """Fitted elsewhere, and where several modes are, each estimate's mean is the likelihood."""
    term, prior = TERMS[term], PRIORS[prior]
    model, exact = one_site(prior, term)
    log_weights, _, _ = estimates(model, ["x"], data(term), num_particles, points)
    assert worst_score(log_weights, exact) < 4.0


@pytest.mark.parametrize("num_particles", [2, 5, 16])
def test_sites_inside_others_are_defended_together(num_particles):
    y = torch.tensor([[0.3, 1.2], [2.0, -3.0], [6.0, 0.5]], dtype=torch.float64)
    log_weights, _, _ = estimates(effects_in_effects, ["x", "w"], y, num_particles)
    assert worst_score(log_weights, effects_in_effects_exact(y)) < 4.0


def excess(num_particles=8):
    """The largest log weight of a particle, less its log likelihood, beside what is promised."""
    term = TERMS["conflict"]
    model, _ = one_site(normal, term)
    log_weights, values, layout = estimates(model, ["x"], Y, num_particles, replicates=4000)
    gap = log_weights - term(values["x"]).log_prob(Y)
    counts = torch.tensor([stratum.count for stratum in layout.strata])
    found = torch.stack([part.max() for part in gap.split(counts.tolist(), 1)]) + counts.log()
    return found - torch.tensor([-math.log(PRIOR_SHARE), 0.0])


def _forgets_the_prior(monkeypatch):
    """As if all particles were weighed by the proposal's density alone."""
    monkeypatch.setattr(estimator_module, "defended", lambda log_ratio: log_ratio)


def _mistakes_the_share(monkeypatch):
    """As if the prior's share in the mixture were not that of its particles' weights."""
    monkeypatch.setattr(estimator_module, "PRIOR_SHARE", 10.0 * PRIOR_SHARE)


def _forgets_who_shares(monkeypatch):
    """As if each kind of particle counted whole."""

    def whole(layout):
        counts = [s.count for s in layout.strata for _ in range(s.count)]
        return -torch.tensor(counts).double().log()

    monkeypatch.setattr(Layout, "log_factors", property(whole))


def test_weights_are_bounded_by_the_likelihood(monkeypatch):
    assert bool((excess() <= 1e-9).all())
    _forgets_the_prior(monkeypatch)
    assert excess().max() > 1.0


@pytest.mark.parametrize("sabotage", [_mistakes_the_share, _forgets_who_shares])
def test_sabotaged_shares_are_noticed(sabotage, monkeypatch):
    model, exact = one_site(normal, TERMS["counts"])
    assert worst_score(estimates(model, ["x"], Y.round(), 16)[0], exact) < 4.0
    sabotage(monkeypatch)
    assert worst_score(estimates(model, ["x"], Y.round(), 16)[0], exact) > 8.0


@pytest.mark.parametrize(
    ("num_particles", "strata"),
    [
        (1, [(1, False)]),
        (2, [(1, False), (1, True)]),
        (9, [(8, False), (1, True)]),
        (16, [(14, False), (2, True)]),
    ],
)
def test_some_particles_come_from_the_prior(num_particles, strata):
    model, _ = one_site(normal, TERMS["square"])
    log_weights, _, layout = estimates(model, ["x"], Y, num_particles, replicates=2)
    assert [(s.count, s.from_prior) for s in layout.strata] == strata
    assert log_weights.shape[1] == num_particles


def test_particles_of_the_prior_follow_it():
    """And those of the proposal do not: what they follow is the likelihood."""
    model, _ = one_site(normal, lambda x: dist.Normal(x, 0.1))
    _, values, layout = estimates(model, ["x"], Y, 8)
    x = values["x"][:, layout.from_prior]
    error = 1.0 / math.sqrt(len(x))
    assert bool(((x.mean((0, 1)) - HERE["mean"]).abs() < 4 * error).all())
    assert bool(((x.std((0, 1)) - 1.0).abs() < 3 * error).all())
    assert values["x"][:, ~layout.from_prior].std((0, 1)).max() < 0.11
