"""Latent paths: what is a path, exact estimates of Gaussian ones, unbiased ones of others."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.proposals.path import PathParticle, PathProposal
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.estimates import assert_unbiased, estimates

T = 20
PILOT = {"phi": 0.8, "s": 0.5, "r": 0.6}
AT = {"phi": 0.5, "s": 0.3, "r": 0.9}
torch.manual_seed(0)
Y = (0.3 * torch.randn(T, dtype=torch.float64)).cumsum(0) + 0.5 * torch.randn(T).double()


def at(values):
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def parameters():
    one = torch.ones((), dtype=torch.float64)
    phi = pyro.sample("phi", dist.Uniform(-one, one))
    return phi, pyro.sample("s", dist.HalfNormal(one)), pyro.sample("r", dist.HalfNormal(one))


class Autoregression(dist.TorchDistribution):
    """A stationary path about a mean, in linear time."""

    arg_constraints = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, mean, phi, scale, length):
        self.centre, self.phi, self.scale = mean, phi, scale
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value):
        x = value - self.centre
        first = dist.Normal(0.0, self.scale / (1 - self.phi**2).sqrt()).log_prob(x[..., 0])
        return first + dist.Normal(self.phi * x[..., :-1], self.scale).log_prob(x[..., 1:]).sum(-1)

    def rsample(self, sample_shape=()):
        path = [self.scale / (1 - self.phi**2).sqrt() * torch.randn(sample_shape).double()]
        for _ in range(self.event_shape[0] - 1):
            path.append(self.phi * path[-1] + self.scale * torch.randn(sample_shape).double())
        return self.centre + torch.stack(path, -1)


def chain(y):
    phi, s, r = parameters()
    x = None
    for t in pyro.markov(range(len(y))):
        prior = dist.Normal(phi * x, s) if t else dist.Normal(0.0, s / (1 - phi**2).sqrt())
        x = pyro.sample(f"x_{t}", prior)
        pyro.sample(f"y_{t}", dist.Normal(x, r), obs=y[t])


def vector(y):
    phi, s, r = parameters()
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(x, r).to_event(1), obs=y)


def dense_vector(y):
    phi, s, r = parameters()
    times = torch.arange(len(y))
    matrix = s**2 / (1 - phi**2) * phi ** (times[:, None] - times).abs()
    x = pyro.sample("x", dist.MultivariateNormal(y.new_zeros(len(y)), matrix))
    pyro.sample("y", dist.Normal(x, r).to_event(1), obs=y)


def steps_in_a_plate(y):
    phi, s, r = parameters()
    with pyro.plate("time", len(y)):
        step = pyro.sample("x", dist.Normal(y.new_zeros(()), s))
        pyro.sample("y", dist.Normal(step.cumsum(-1), r), obs=y)


def standard_steps(y):
    phi, s, r = parameters()
    step = pyro.sample("x", dist.Normal(y.new_zeros(len(y)), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(s * step.cumsum(-1), r).to_event(1), obs=y)


def levels_and_slopes(y):
    phi, s, r = parameters()
    level, slope = y.new_zeros(()), y.new_zeros(())
    for t in range(len(y)):
        level = pyro.sample(f"level_{t}", dist.Normal(level + slope, s))
        slope = pyro.sample(f"slope_{t}", dist.Normal(phi * slope, 0.1))
        pyro.sample(f"y_{t}", dist.Normal(level, r), obs=y[t])


def kalman(y, transition, noise, start, read, r) -> Tensor:
    """The exact log likelihood of a linear Gaussian chain, by the filter."""
    mean, covariance = torch.zeros(len(read)).double(), start
    total = torch.zeros(()).double()
    for t, value in enumerate(y):
        if t:
            mean = transition @ mean
            covariance = transition @ covariance @ transition.T + noise
        variance = read @ covariance @ read + r**2
        total = total + dist.Normal(read @ mean, variance.sqrt()).log_prob(value)
        gain = covariance @ read / variance
        mean = mean + gain * (value - read @ mean)
        covariance = covariance - gain[:, None] * (read @ covariance)
    return total


def one_by_one(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


def exact(model, y) -> Tensor:
    phi, s, r = AT.values()
    one = torch.ones(1, dtype=torch.float64)
    if model in (steps_in_a_plate, standard_steps):
        return kalman(y, one_by_one(1.0), one_by_one(s**2), one_by_one(s**2), one, r)
    if model is levels_and_slopes:
        move = torch.tensor([[1.0, 1.0], [0.0, phi]], dtype=torch.float64)
        noise = torch.diag(torch.tensor([s**2, 0.01], dtype=torch.float64))
        return kalman(y, move, noise, noise, torch.tensor([1.0, 0.0]).double(), r)
    stationary = one_by_one(s**2 / (1 - phi**2))
    return kalman(y, one_by_one(phi), one_by_one(s**2), stationary, one, r)


FORMS = {
    "a loop of sites": (chain, ["x"], (2, 1)),
    "one vector": (vector, ["x"], (2, 1)),
    "a dense vector": (dense_vector, ["x"], (2, 1)),
    "steps in a plate": (steps_in_a_plate, ["x"], (2, 1)),
    "standard steps": (standard_steps, ["x"], (2, 1)),
    "two states": (levels_and_slopes, ["level", "slope"], (3, 1)),
}


@pytest.mark.parametrize(("model", "sites", "widths"), FORMS.values(), ids=FORMS)
def test_one_particle_is_exact_where_all_is_gaussian(model, sites, widths):
    marginal = marginalize(model, sites, num_particles=1)
    marginal.fit(Y, pilot=at(PILOT))
    found = repeated_estimates(marginal, at(AT), 3, Arguments((Y,), {}))[:, 0]
    assert (found - exact(model, Y)).abs().max() < 1e-9
    (fit,) = marginal.proposal.fitted.values()
    assert fit.bands[1:] == widths


def volatility(y):
    one = torch.ones((), dtype=torch.float64)
    phi = pyro.sample("phi", dist.Uniform(-one, one))
    s = pyro.sample("s", dist.HalfNormal(one))
    x = pyro.sample("x", Autoregression(0.0, phi, s, len(y)))
    pyro.sample("y", dist.Normal(y.new_zeros(()), (x / 2).exp()).to_event(1), obs=y)


def filtered(y, phi, s, points=801, reach=9.0) -> Tensor:
    """The log likelihood of stochastic volatility by a filter on a grid."""
    grid = torch.linspace(-reach, reach, points, dtype=torch.float64) * s / (1 - phi**2) ** 0.5
    width = grid[1] - grid[0]
    move = dist.Normal(phi * grid[:, None], s).log_prob(grid).exp() * width
    weights = dist.Normal(0.0, s / (1 - phi**2) ** 0.5).log_prob(grid).exp() * width
    total = torch.zeros(()).double()
    for t, value in enumerate(y):
        weights = weights @ move if t else weights
        weights = weights * dist.Normal(0.0, (grid / 2).exp()).log_prob(value).exp()
        total, weights = total + weights.sum().log(), weights / weights.sum()
    return total


def returns(length, seed=3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, length, generator=generator, dtype=torch.float64)
    x = [noise[0, 0]]
    for z in noise[0, 1:]:
        x.append(0.9 * x[-1] + 0.4 * z)
    return (torch.stack(x) / 2).exp() * noise[1]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_estimates_of_a_volatility_are_unbiased(steps, monkeypatch):
    y = returns(20)
    marginal = marginalize(volatility, ["x"], num_particles=2, proposal=PathProposal(steps))
    marginal.fit(y, pilot=at({"phi": 0.9, "s": 0.4}))
    away = {"phi": 0.6, "s": 0.7}

    def check():
        torch.manual_seed(0)
        assert_unbiased(estimates(marginal, at(away), y)["x"], filtered(y, **away))

    check()
    mix = PathParticle.mix
    monkeypatch.setattr(
        PathParticle,
        "mix",
        lambda p, ratios: (mix(p, ratios)[0] + 0.1 * p.path.square().mean(-1), None),
    )
    with pytest.raises(AssertionError):
        check()
