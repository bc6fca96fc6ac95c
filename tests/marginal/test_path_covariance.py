"""Vectors of which the model gives the covariance: their proposal is that of the precision."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hamflow import marginalize
from pyro_hamflow.marginal import path_fit, path_modes
from pyro_hamflow.marginal.path_covariance import map_at
from pyro_hamflow.marginal.path_density import expand
from pyro_hamflow.marginal.path_fit import gaussian_at
from pyro_hamflow.marginal.path_modes import captured_looks
from pyro_hamflow.marginal.pilot import find_pilot
from pyro_hamflow.marginal.proposals.path import FOLLOWING
from pyro_hamflow.marginal.whitening.affine import CovariancePrior
from pyro_hamflow.model.kinds import Arguments
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
    parts = programs_of(marginal).parts_at(AWAY)
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


def programs_of(marginal):
    (programs,) = marginal.plan(CLASSES).structure.programs.values()
    return programs


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_looks_by_covariance_see_what_those_by_precision_do(damping):
    marginal = marginalize(classes, ["f"], num_particles=1)
    marginal.fit(CLASSES, pilot=PILOT)
    programs, place = programs_of(marginal), 1.5 * X.cos()
    here = programs.look_at(AWAY)(place)
    there = captured_looks(programs.parts_at, programs.bands, X, AWAY)(AWAY)(place)
    torch.testing.assert_close(here.slope, there.slope, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(here.deviations(), there.deviations(), rtol=1e-7, atol=0.0)
    constant = 0.5 * len(X) * math.log(2.0 * math.pi)
    torch.testing.assert_close(here.value - constant, there.value, rtol=1e-9, atol=1e-7)
    torch.testing.assert_close(here.mass() - constant, there.mass(), rtol=1e-9, atol=1e-7)
    none = torch.zeros_like(X)
    moves = [look.gaussian(place).draw(none) for look in (here, there)]
    torch.testing.assert_close(*moves, rtol=1e-7, atol=1e-7)
    weights = expand(programs.parts_at(AWAY).likelihood, place, 1).bands[:, 0]
    precision = (1.0 + damping) * covariance(2.0, X).inverse() + weights.diag()
    step = torch.linalg.solve(precision, there.slope)
    torch.testing.assert_close(here.step(torch.tensor(damping)), step, rtol=1e-6, atol=1e-6)


def test_fits_take_no_products_with_the_prior(monkeypatch):
    """One for each number of a vector, they took ten times as long as all else."""
    marginal = marginalize(classes, ["f"], num_particles=1)
    marginal.fit(CLASSES, pilot=PILOT)
    for module in (path_fit, path_modes):
        given = module.expand

        def expand(density, x, width, given=given):
            assert width == 1
            return given(density, x, width)

        monkeypatch.setattr(module, "expand", expand)
    marginal.follow(AWAY, CLASSES)
    marginal.fit(CLASSES, pilot=AWAY)
    fit = marginal.proposal.fitted["f"]
    slope = programs_of(marginal).look_at(AWAY)(fit.mode).slope
    assert fit.by_covariance and slope.abs().max() < 1e-4


def test_the_search_for_a_pilot_takes_slopes_back_by_blocks(monkeypatch):
    monkeypatch.setattr(large_factors, "BLOCK", 5)
    calls, given = [], large_factors.slope_in_matrix

    def slope_in_matrix(factor, slope):
        calls.append(len(factor))
        return given(factor, slope)

    monkeypatch.setattr(large_factors, "slope_in_matrix", slope_in_matrix)
    marginal = marginalize(classes, ["f"], num_particles=1)
    find_pilot(marginal, Arguments((CLASSES,), {}))
    assert calls.count(24) >= 10  # the prior's factor and the posterior's, at each place


def test_many_paths_come_of_one_factor():
    """Of a copy for each, 33 seconds went by before four chains of 1,000 places began."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "solve_triangular" in str(func):
                sizes.append(args[0].numel())
            return func(*args, **(kwargs or {}))

    sizes = []
    prior = CovariancePrior(0.1 * X, torch.linalg.cholesky(covariance(2.0, X)))
    found = prior.times(torch.ones_like(X)[:, None], X)
    noise = torch.randn(3, 5, 24, dtype=torch.float64)
    with Watch():
        paths = torch.func.vmap(torch.func.vmap(found.draw))(noise)
    torch.testing.assert_close(paths[2, 4], found.draw(noise[2, 4]))
    assert sizes and max(sizes) == 24 * 24
