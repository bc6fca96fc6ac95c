"""Modes that a population from the prior misses are found by descents, and keep their share."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import AnnealedSampler
from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import PriorAndModes
from pyro_hamflow.smc import annealing, discovery
from pyro_hamflow.smc.annealing import anneal
from pyro_hamflow.smc.discovery import look_for_modes
from tests.helpers.kinds import long_but


def mixture(dimension, parts, scale):
    """Normals of (share, mean, scale) each, beneath a wide prior; its evidence is one."""
    prior = dist.Normal(torch.zeros(dimension), scale).to_event(1)

    def model():
        x = pyro.sample("x", prior)
        terms = [
            math.log(share) + dist.Normal(mean, width).log_prob(x).sum(-1)
            for share, mean, width in parts
        ]
        pyro.factor("density", torch.logsumexp(torch.stack(terms), 0) - prior.log_prob(x))

    return model


# A normal of a quarter of the other's width has 1e-4 of its mass where the prior counts for most.
NARROW = mixture(8, [(0.4, 0.0, 0.4), (0.6, 4.0, 1.5)], 4.0)


def share_of_narrow(seed):
    sampler = AnnealedSampler(NARROW, seed=seed, disable_progbar=True)
    sampler.run()
    return sampler, float(sampler.mean((sampler.samples["x"].mean(-1) < 2.0).double()))


@pytest.mark.parametrize("seed", long_but([1, 2], range(1, 5)))
def test_a_narrow_mode_has_its_share(seed):
    """A few particles find it with one seed in five."""
    sampler, share = share_of_narrow(seed)
    assert abs(share - 0.4) < 0.05
    assert abs(sampler.log_evidence) < 4.0 * sampler.log_evidence_error < 0.4
    assert "Descents found 1 mode that" in sampler.message


def lottery_of(potential, position, log_weights):
    """How many modes count as missed by a population, and how many a path should begin at."""
    found = look_for_modes(potential, position, log_weights, position[::8], 1000)
    return found.num_missed, len(found.modes)


def test_a_lottery_is_no_share(monkeypatch):
    """Of one part in sixteen that holds the mode alone, the mean is right and says nothing."""
    torch.manual_seed(0)
    potential = Potential(NARROW)
    shape = (16, 125)
    narrow, wide = 0.4 * torch.randn(2000, 8), 4.0 + 1.5 * torch.randn(2000, 8)
    in_one = (torch.arange(2000) < 125)[:, None]
    position = torch.where(in_one, narrow, wide)
    log_weights = torch.zeros(shape)
    log_weights[0] = math.log(10.0)  # of 25 in all: the share is right
    assert lottery_of(potential, position, log_weights) == (1, 2)
    with monkeypatch.context() as spoilt:
        spoilt.setattr(discovery, "_LUCK", math.inf)
        assert lottery_of(potential, position, log_weights) == (0, 0)
    everywhere = torch.where(torch.rand(2000, 1) < 0.4, narrow, wide)
    assert lottery_of(potential, everywhere, torch.zeros(shape)) == (0, 0)


def found_beyond(mean, width):
    """Modes that descents find in fifty dimensions beside one that the population has."""
    torch.manual_seed(0)
    there = mixture(50, [(0.5, 4.0 - mean, 1.0), (0.5, mean, width)], 4.0)
    position = 4.0 - mean + torch.randn(2000, 50)
    visited = 4.0 * torch.randn(5000, 50)
    found = look_for_modes(Potential(there), position, torch.zeros(16, 125), visited, 1000)
    return found.num_missed


def test_descents_begin_nearer_and_farther_than_draws_of_many_dimensions(monkeypatch):
    asked = (0.0, 0.5), (4.0, 1.0)  # narrow in the middle, and as wide far from it
    assert [found_beyond(*each) for each in asked] == [1, 1]
    monkeypatch.setattr(discovery, "_NEAREST", 1.0)
    monkeypatch.setattr(discovery, "_FARTHEST", 1.0)
    assert [found_beyond(*each) for each in asked] == [0, 0]


HIGH = torch.tensor([[-2.0, 3.0], [3.4, -1.2]])


def egg_carton():
    """Two of very many hollows hold nearly all: of 2500 in reach of the prior, as periods are."""
    x = pyro.sample("x", dist.Uniform(-5.0, 5.0).expand([2]).to_event(1))
    hollows = 4.0 * torch.cos(10.0 * math.pi * x).sum(-1)
    near = (-(x - HIGH).square().sum(-1) / 0.06).exp().sum(-1)
    pyro.factor("density", hollows + 12.0 * near)


def num_high(seed):
    """How many of them a population in haste knows."""
    torch.manual_seed(seed)
    potential = Potential(egg_carton)
    found = anneal(potential, 1000, conditional_ess=0.5, num_moves=1, only_first=True).found
    places = [potential.constrain(mode.position[None])["x"][0] for mode in found]
    return sum(any(torch.dist(place, at) < 0.05 for place in places) for at in HIGH)


def test_hollows_that_few_draws_are_in_are_found_by_the_likeliest(monkeypatch):
    assert sum(num_high(seed) for seed in range(6)) >= 11  # 79 of 80 by forty seeds
    monkeypatch.setattr(discovery, "_likely", lambda descent, prior, *_: prior.draw(1)[0])
    assert sum(num_high(seed) for seed in range(6)) < 10


def test_without_descents_it_has_not(monkeypatch):
    monkeypatch.setattr(annealing, "look_for_modes", lambda *args, **also: ([], 0, []))
    assert all(abs(share_of_narrow(seed)[1] - 0.4) > 0.1 for seed in (1, 2))


def test_a_spike_in_a_slab_has_its_share():
    spike = mixture(4, [(0.4, 0.0, 0.02), (0.6, 0.0, 1.0)], 3.0)
    sampler = AnnealedSampler(spike, seed=1, disable_progbar=True)
    sampler.run()
    inside = sampler.samples["x"].norm(dim=-1) < 0.1
    assert abs(float(sampler.mean(inside.double())) - 0.4) < 0.05
    assert abs(sampler.log_evidence) < 4.0 * sampler.log_evidence_error < 0.5


def test_posteriors_that_the_prior_finds_begin_at_the_prior_and_pay_little(monkeypatch):
    asked = []
    evaluate = Descent.value_and_gradient

    def counting(self, position):
        asked.append(len(position))
        return evaluate(self, position)

    monkeypatch.setattr(Descent, "value_and_gradient", counting)
    for parts in ([(1.0, 1.0, 0.5)], [(0.25, -2.5, 0.7), (0.75, 2.5, 0.7)]):
        asked.clear()
        population = anneal(Potential(mixture(8, parts, 5.0)), 1000)
        assert population.modes == []
        assert len(population.found) == len(parts)
        assert sum(asked) < 0.1 * population.num_gradients * len(population.position)


def beginning():
    """A prior of standard deviation 3 and two normals."""
    mean = torch.tensor([[1.0, -2.0], [4.0, 4.0]])
    precision = torch.tensor([[[4.0, 1.0], [1.0, 2.0]], [[25.0, 0.0], [0.0, 1.0]]])
    prior = Prior(Potential(mixture(2, [(1.0, 0.0, 1.0)], 3.0)))
    start = PriorAndModes(prior, mean, precision)
    normals = [
        dist.MultivariateNormal(torch.zeros(2), 9.0 * torch.eye(2)),
        *map(dist.MultivariateNormal, mean, torch.linalg.inv(precision)),
    ]
    return start, normals


def test_where_paths_begin_is_a_mixture_of_prior_and_modes():
    start, normals = beginning()
    position, noise = start.draw(40_000)
    log_parts = torch.stack([normal.log_prob(position) for normal in normals])
    log_density = (log_parts + torch.tensor([0.5, 0.25, 0.25]).log()[:, None]).logsumexp(0)
    torch.testing.assert_close(start.value(position, noise), -log_density)
    for log_part in log_parts:  # draws have this density if the mean of each p / q is one
        ratio = (log_part - log_density).exp()
        assert abs(float(ratio.mean()) - 1.0) < 4.0 * float(ratio.std()) / 200.0


def test_the_gradient_there_is_that_of_its_density():
    start, _ = beginning()
    position, noise = start.draw(50)
    value, gradient = start.graph("gradient", 50)(position, noise)
    torch.testing.assert_close(value, start.value(position, noise))
    for column, move in enumerate(1e-5 * torch.eye(2)):
        change = start.value(position + move, noise) - start.value(position - move, noise)
        torch.testing.assert_close(gradient[:, column], change / 2e-5, atol=1e-6, rtol=1e-6)
