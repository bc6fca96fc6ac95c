"""Paths whose densities have kinks: no second derivative tells how far their states may go."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize, whiten
from pyro_hamflow.marginal import path_modes
from pyro_hamflow.marginal.path_kinks import Cells, Kinks, about, reaches
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.marginal.whitening.fit import log_prob_of
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.estimates import assert_unbiased
from tests.helpers.kinds import long_but

T = 20
generator = torch.Generator().manual_seed(4)
LEVEL = (0.3 * torch.randn(T, generator=generator).double()).cumsum(0)
NOISE = torch.randn(T, generator=generator).double()
Y = LEVEL + 0.4 * NOISE.sign() * NOISE.square()
PILOT = {"s": torch.tensor(0.3).double(), "r": torch.tensor(0.35).double()}
AWAY = {"s": torch.tensor(0.4).double(), "r": torch.tensor(0.3).double()}


def laplace(x, r):
    return dist.Laplace(x, r)


def quantile(x, r):
    return dist.AsymmetricLaplace(x, r, 0.6)


def hinge(x, r):
    return dist.Laplace((x + 1.0).clamp(min=0.0), r)


def steps(observed, move):
    def model(y):
        s = pyro.sample("s", dist.HalfNormal(y.new_ones(())))
        r = pyro.sample("r", dist.HalfNormal(y.new_ones(())))
        with pyro.plate("time", len(y)):
            step = pyro.sample("step", move(y.new_zeros(()), s))
            pyro.sample("y", observed(step.cumsum(-1), r), obs=y)

    return model


def filtered(y, observed, move, s, r, points=1501, reach=5.0):
    """The log likelihood of a random walk by a filter on a grid."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64)
    width, total = grid[1] - grid[0], 0.0
    moves = move(grid[:, None], s).log_prob(grid).exp() * width
    weights = move(torch.zeros(()).double(), s).log_prob(grid).exp() * width
    for t, value in enumerate(y):
        weights = (weights @ moves if t else weights) * observed(grid, r).log_prob(value).exp()
        total, weights = total + float(weights.sum().log()), weights / weights.sum()
    return total


FORMS = {
    "double exponential": (laplace, dist.Normal, Kinks(prior=False, likelihood=True)),
    "quantile": (quantile, dist.Normal, Kinks(prior=False, likelihood=True)),
    "hinge": (hinge, dist.Normal, Kinks(prior=False, likelihood=True)),
    "jumps": (dist.Normal, dist.Laplace, Kinks(prior=True, likelihood=False)),
    "both": (laplace, dist.Laplace, Kinks(prior=True, likelihood=True)),
}


@pytest.mark.parametrize("name", long_but(["both"], FORMS))
def test_one_particle_tells_the_likelihood_of_a_path_with_kinks(name):
    observed, move, kinks = FORMS[name]
    marginal = marginalize(steps(observed, move), ["step"], num_particles=1)
    marginal.fit(Y, pilot=PILOT)
    (fit,) = marginal.proposal.fitted.values()
    assert fit.bands[1:] == (2, 1)
    assert fit.kinks == kinks
    for values in (PILOT, AWAY):
        torch.manual_seed(0)
        found = repeated_estimates(marginal, values, 150, Arguments((Y,), {}))[:, 0]
        truth = filtered(Y, observed, move, **values)
        relative = (found - truth).exp()
        error = float(relative.std()) / math.sqrt(len(relative))
        assert abs(float(relative.mean()) - 1.0) < 4 * error
        assert float(found.var()) < 5.0  # by second derivatives alone it is above a thousand


def test_without_gradients_at_points_nothing_tells_of_a_path_with_kinks(monkeypatch):
    monkeypatch.setattr(path_modes, "has_kinks", lambda *_: False)
    marginal = marginalize(steps(laplace, dist.Normal), ["step"], num_particles=1)
    marginal.fit(Y, pilot=PILOT)
    found = repeated_estimates(marginal, PILOT, 100, Arguments((Y,), {}))[:, 0]
    assert float(found.var()) > 100.0


def student(x, scale):
    return dist.StudentT(3.0, x, scale)


def test_steps_with_heavy_tails_are_as_wide_as_they_mostly_are(monkeypatch):
    """By the curvature of their narrow middle, mean weights come from paths hardly ever drawn."""
    y = Y + 4.0 * (torch.arange(T) >= T // 2)
    values = {"s": torch.tensor(0.4).double(), "r": torch.tensor(0.7).double()}

    def estimated():
        marginal = marginalize(steps(dist.Normal, student), ["step"], num_particles=4)
        marginal.fit(y, pilot=values)
        torch.manual_seed(0)
        return repeated_estimates(marginal, values, 4000, Arguments((y,), {}))[:, 0]

    found = estimated()
    truth = filtered(y, dist.Normal, student, **values, points=3001, reach=30.0)
    assert_unbiased(found[:, None], truth)
    monkeypatch.setattr(path_modes, "is_steep", lambda *_: False)
    assert estimated().var() > 2.5 * found.var()


def test_states_of_one_time_may_share_a_kink():
    inputs = torch.randn(T, generator=torch.Generator().manual_seed(5)).double()
    slope = 0.2 * NOISE.flip(0).cumsum(0)

    def model(y):
        s = pyro.sample("s", dist.HalfNormal(y.new_ones(())))
        r = pyro.sample("r", dist.HalfNormal(y.new_ones(())))
        step = pyro.sample("step", dist.Normal(y.new_zeros(T, 2), s).to_event(2))
        states = step.cumsum(-2)
        mean = states[..., 0] + states[..., 1] * inputs
        pyro.sample("y", dist.Laplace(mean, r).to_event(1), obs=y)

    marginal = marginalize(model, ["step"], num_particles=1)
    marginal.fit(Y + slope * inputs, pilot=PILOT)
    (fit,) = marginal.proposal.fitted.values()
    assert fit.bands[1:] == (3, 2)
    data = Arguments((Y + slope * inputs,), {})
    assert float(repeated_estimates(marginal, PILOT, 200, data)[:, 0].var()) < 10.0


def test_means_about_a_kink_have_a_closed_form():
    def slopes(paths):
        return -(paths - 0.3).sign()

    place = torch.tensor([0.0, 0.2, 1.5]).double()
    spread = torch.tensor([1.0, 0.5, 2.0]).double()
    for mean, deviations in ((place, spread), (place + 0.3, 1.4 * spread)):
        mean = mean.clone().requires_grad_()
        found, bands = about(slopes, Cells(place, spread), mean, deviations, 1)
        z = (mean - 0.3) / deviations
        curvature = 2.0 * (-0.5 * z.square()).exp() / math.sqrt(2.0 * math.pi) / deviations
        assert (found + torch.special.erf(z / math.sqrt(2.0))).abs().max() < 0.2
        assert (bands[:, 0] / curvature - 1.0).abs().max() < 0.1
        (growth,) = torch.autograd.grad(found.sum(), mean)  # smooth, with the slope it should have
        assert (growth / curvature + 1.0).abs().max() < 0.1


def test_gradients_tell_which_states_share_a_kink():
    def slope(path):
        jumps = (path[3:] - path[:-3]).sign()
        none = path.new_zeros(3)
        return torch.cat([none, jumps]) - torch.cat([jumps, none])

    torch.manual_seed(0)
    x, other = torch.randn(2, 200).double()
    assert not reaches(slope, x, 3.0 * other, 4)
    assert reaches(slope, x, 3.0 * other, 3)


def process_with_kinks(y):
    s = pyro.sample("s", dist.HalfNormal(y.new_ones(())))
    r = pyro.sample("r", dist.HalfNormal(y.new_ones(())))
    times = torch.arange(len(y)).to(y) / 10.0
    matrix = s**2 * (-(times[:, None] - times).square()).exp() + 1e-4 * torch.eye(len(y)).to(y)
    x = pyro.sample("x", dist.MultivariateNormal(torch.zeros_like(y), matrix))
    pyro.sample("y", dist.Laplace(x, r).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "site"), [(steps(laplace, dist.Normal), "step"), (process_with_kinks, "x")]
)
def test_noise_of_a_path_with_kinks_is_about_white(model, site):
    torch.manual_seed(0)

    def spread(fit, shift):
        theta = fit.centre + shift
        values = fit.split.values(theta)
        path = fit.map(values)
        found = []
        for _ in range(200):
            z = torch.randn_like(fit.u)
            rest = fit.split.log_rest(theta, path.forward(z))
            found.append(log_prob_of(fit.prior, path, z, values) + rest + 0.5 * z @ z)
        return float(torch.stack(found).var().detach())

    fit = whiten(model, [site]).fit(Y)
    for shift in ([0.0, 0.0], [0.2, -0.2]):
        assert spread(fit, torch.tensor(shift).double()) < 4.0
    held = fit.sites.held
    blind = fit.sites._replace(held=held._replace(precision=torch.zeros_like(held.precision)))
    assert spread(fit._replace(sites=blind), torch.zeros(2).double()) > 20.0
