"""Starts far out come down, into the basin that they are in, and others are left alone."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_uniform

from pyro_hamflow.model.far_starts import come_down
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from tests.helpers.zoo import eight_schools

GROUPS = torch.arange(40) % 8, torch.arange(40) // 8
COUNTS = torch.arange(40) % 3


def crossed_counts():
    """Rates are exponentials of sums of products: up to exp(2 + 2 exp(2) 2)."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    scales = pyro.sample("scales", dist.HalfNormal(torch.ones(2)).to_event(1))
    one = pyro.sample("one", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    other = pyro.sample("other", dist.Normal(torch.zeros(5), 1.0).to_event(1))
    rate = (mean + scales[0] * one[GROUPS[0]] + scales[1] * other[GROUPS[1]]).exp()
    pyro.sample("counts", dist.Poisson(rate).to_event(1), obs=COUNTS)


def test_far_starts_come_down():
    potential = Potential(crossed_counts)
    position = torch.empty(200, potential.dimension).uniform_(-2.0, 2.0)
    noise = torch.zeros(200, 0)
    before = potential.value(position, noise)
    assert before.max() > 1e8
    after = potential.value(find_start(potential, 200)[0], noise)
    assert after.max() < before.min() + 10 * potential.dimension
    assert after.std() > 10.0, "they are no modes"


def test_starts_that_a_strategy_gives_stay():
    potential = Potential(crossed_counts)
    position, noise = find_start(potential, 200, strategy=init_to_uniform)
    assert potential.value(position, noise).max() > 1e6


def test_near_starts_stay():
    potential = Potential(eight_schools)
    torch.manual_seed(0)
    position = torch.empty(50, potential.dimension).uniform_(-1.0, 1.0)
    gradient = potential.graph("gradient", 50)
    assert torch.equal(come_down(gradient, position, torch.zeros(50, 0)), position)


def test_far_starts_stay_in_their_basins():
    def gradient(position, noise):
        """Two wells, at -1 and 1, with walls of thousands."""
        x = position[:, 0]
        return 1e3 * (x**2 - 1) ** 2, 4e3 * (x * (x**2 - 1))[:, None]

    position = torch.tensor([[-2.0], [1.9], [0.2], [-0.1], [1.01]])
    found = come_down(gradient, position, torch.zeros(5, 0))
    assert bool((found.sign() == position.sign()).all())
    assert gradient(found, None)[0].max() < 20.0
    assert found[-1] == position[-1]


def test_starts_where_nothing_is_finite_around_stay():
    def gradient(position, noise):
        inside = (position == position.round()).all(-1)
        value = torch.where(inside, 1e9 * position.square().sum(-1), torch.nan)
        return value, 2e9 * position

    position = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    assert torch.equal(come_down(gradient, position, torch.zeros(2, 0)), position)
