"""Estimates of short paths, integrated over their noise, beside integrals over the paths.

The mean of an estimate over its noise is the likelihood, and its weights' means of states are their
posterior means: all to the digits of a fine grid, in place of a Monte Carlo error.
"""

from __future__ import annotations

import itertools
import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.path_looks import PathGaussian
from pyro_hamflow.marginal.proposals import path
from pyro_hamflow.marginal.proposals.path import PathParticle, PathProposal
from tests.helpers.kinds import long_but

Y, COUNTS = torch.tensor([0.3, -1.4, 0.8]).double(), torch.tensor([2.0, 0.0, 5.0]).double()
PILOT, AT, STEP = {"phi": 0.7, "s": 0.6}, {"phi": 0.4, "s": 0.9}, 1e-4


def parameters():
    one = torch.ones((), dtype=torch.float64)
    return pyro.sample("phi", dist.Uniform(-one, one)), pyro.sample("s", dist.HalfNormal(one))


def volatility(y):
    phi, s = parameters()
    x = y.new_zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(phi * x, s))
        pyro.sample(f"y_{t}", dist.Normal(y.new_zeros(()), (x / 2).exp()), obs=y[t])


def heavy_transitions(y):
    phi, s = parameters()
    x = y.new_zeros(())
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.StudentT(30.0 * torch.ones_like(s), phi * x, s))
        pyro.sample(f"y_{t}", dist.Normal(x.sin(), torch.ones_like(s)), obs=y[t])


def summed_steps(y):
    phi, s = parameters()
    step = pyro.sample("x", dist.Normal(y.new_zeros(len(y)), s).to_event(1))
    pyro.sample("y", dist.Poisson((phi + step.cumsum(-1)).exp()).to_event(1), obs=y)


def transition(kind, x, before, phi, s):
    if kind is summed_steps:
        return dist.Normal(0.0, s).log_prob(x)
    if kind is heavy_transitions:
        return dist.StudentT(30.0, phi * before, s).log_prob(x)
    return dist.Normal(phi * before, s).log_prob(x)


def likelihood(kind, x, y, phi):
    if kind is volatility:
        return dist.Normal(0.0, (x / 2).exp()).log_prob(y)
    if kind is heavy_transitions:
        return dist.Normal(x.sin(), 1.0).log_prob(y)
    return dist.Poisson((phi + x).exp()).log_prob(y)


def grid(points: int, reach: float) -> tuple[Tensor, float]:
    """Places in three dimensions, ``(points**3, 3)``, and the logarithm of a cell's size."""
    line = torch.linspace(-reach, reach, points, dtype=torch.float64)
    places = torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 3)
    return places, 3.0 * math.log(float(line[1] - line[0]))


def integral(kind, y, phi, s) -> tuple[Tensor, Tensor]:
    """The log likelihood, and the sites' posterior means."""
    phi, s = (torch.tensor(value, dtype=torch.float64) for value in (phi, s))
    x, cell = grid(61, 9.0)
    state = x.cumsum(-1) if kind is summed_steps else x
    log_joint = torch.zeros(len(x), dtype=torch.float64)
    before = torch.zeros(len(x), dtype=torch.float64)
    for t in range(3):
        log_joint = log_joint + transition(kind, x[:, t], before, phi, s)
        log_joint = log_joint + likelihood(kind, state[:, t], y[t], phi)
        before = x[:, t]
    return log_joint.logsumexp(0) + cell, log_joint.softmax(0) @ x


def found(kind, y, steps) -> tuple[Tensor, Tensor, Tensor]:
    """The same and the slope of the log likelihood, from estimates at all places of the noise."""
    noise, cell = grid(31, 7.5)
    marginal = marginalize(kind, ["x"], num_particles=len(noise), proposal=PathProposal(steps))
    marginal.fit(y, pilot={name: torch.tensor(value).double() for name, value in PILOT.items()})
    plan = marginal.plan(y)
    (group,) = plan.structure.groups
    values = {name: torch.tensor(value).double().requires_grad_() for name, value in AT.items()}
    with marginal.hold(plan.structure):
        estimate = marginal.estimate(group, noise, values, y)
    normal = -0.5 * (noise.square() + math.log(2.0 * math.pi)).sum(-1)
    logs = estimate.log_weights.flatten() + math.log(len(noise)) + normal
    total = logs.logsumexp(0) + cell
    slope = torch.stack(torch.autograd.grad(total, list(values.values()), retain_graph=True))
    states = torch.cat([value.reshape(len(noise), -1) for value in estimate.values.values()], -1)
    return total.detach(), (logs.softmax(0) @ states).detach(), slope


def check(kind, y, steps):
    total, means, slope = found(kind, y, steps)
    expected, states = integral(kind, y, **AT)
    assert (total - expected).abs() < 1e-5
    assert (means - states).abs().max() < 1e-5
    for i, name in enumerate(AT):
        up, down = (
            integral(kind, y, **(AT | {name: AT[name] + side * STEP}))[0] for side in (1, -1)
        )
        assert (slope[i] - (up - down) / (2.0 * STEP)).abs() < 1e-4


CASES = {
    "volatility": (volatility, Y),
    "heavy": (heavy_transitions, Y),
    "sums": (summed_steps, COUNTS),
}


@pytest.mark.parametrize(
    ("name", "steps"),
    long_but(
        [("volatility", 0), ("volatility", 2), ("heavy", 1), ("sums", 2)],
        itertools.product(CASES, range(3)),
    ),
)
def test_estimates_integrate_to_the_likelihood(name, steps):
    check(*CASES[name], steps)


def cells(count: int) -> Tensor:
    """Normal noise at the middles of the cells that a cube of probability is cut into."""
    line = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    return torch.stack(torch.meshgrid(line, line, line, indexing="ij"), -1).reshape(-1, 1, 1, 3)


def over_cells(y, points, num_particles) -> Tensor:
    """The log of the mean of estimates over all cells that their noise may fall in."""
    noise = cells(12)
    marginal = marginalize(
        volatility, ["x"], num_particles=num_particles, proposal=PathProposal(1), points=points
    )
    marginal.fit(y, pilot={name: torch.tensor(value).double() for name, value in PILOT.items()})
    plan = marginal.plan(y)
    (group,) = plan.structure.groups
    values = {name: torch.tensor(value).double() for name, value in AT.items()}

    def one(noise: Tensor) -> Tensor:
        return marginal.estimate(group, noise, values, y).log_weights.logsumexp(0)

    with marginal.hold(plan.structure):
        logs = torch.func.vmap(one)(noise.reshape(len(noise), 1, 3))
    return logs.logsumexp(0) - math.log(len(noise))


@cache
def alone() -> Tensor:
    """Of one particle, to which all are compared."""
    return over_cells(Y, "iid", 1)


@pytest.mark.parametrize(("points", "num_particles"), [("antithetic", 2), ("rqmc", 3), ("rqmc", 4)])
def test_pairs_and_lattices_fall_into_each_cell_alike(points, num_particles):
    """A mirror image, or a shift by some cells, only changes their order."""
    assert (over_cells(Y, points, num_particles) - alone()).abs() < 1e-9
    assert (alone() - integral(volatility, Y, **AT)[0]).abs() < 0.02  # a coarse grid


def test_a_lattice_that_does_not_wrap_round_is_found_out(monkeypatch):
    right = alone()
    monkeypatch.setattr(torch.Tensor, "floor", lambda shifted: 0.0 * shifted)
    assert (over_cells(Y, "rqmc", 3) - right).abs() > 1e-6


def without_stretch(monkeypatch):
    monkeypatch.setattr(path.torch, "log1p", torch.zeros_like)


def wrong_determinant(monkeypatch):
    right = path.banded.log_det
    monkeypatch.setattr(path.banded, "log_det", lambda root: 0.99 * right(root))


def one_weight_lost(monkeypatch):
    mix = PathParticle.mix

    def spoilt(particle, ratios):
        ratio, rest = mix(particle, ratios)
        return torch.where(particle.path[..., 0] > 1.5, -math.inf, ratio), rest

    monkeypatch.setattr(PathParticle, "mix", spoilt)


def place_not_followed(monkeypatch):
    """The slope alone is wrong: as of an adjoint that misses a part."""
    draw = PathGaussian.draw
    monkeypatch.setattr(
        PathGaussian,
        "draw",
        lambda found, noise: draw(found, noise) * 0.99 + draw(found, noise).detach() * 0.01,
    )


@pytest.mark.parametrize(
    "spoil", [without_stretch, wrong_determinant, one_weight_lost, place_not_followed]
)
def test_spoilt_estimates_do_not(spoil, monkeypatch):
    spoil(monkeypatch)
    with pytest.raises(AssertionError):
        check(volatility, Y, 1)
