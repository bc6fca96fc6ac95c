"""Paths that a long recursion runs through: searches begin near them, and look for bands once."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal import path_bands, pilot
from pyro_hamflow.marginal.climb import climb
from pyro_hamflow.marginal.path_bands import Bands, find_bands
from pyro_hamflow.marginal.path_density import Order, Parts
from pyro_hamflow.marginal.path_looks import Look
from pyro_hamflow.marginal.path_modes import centre_of, higher_start
from pyro_hamflow.marginal.path_modes import climb as climb_path
from pyro_hamflow.model.kinds import Arguments

PEOPLE = 10_000.0


def epidemic(cases):
    """Susceptible, infected and recovered, whose rate of contacts is a random walk."""
    level = pyro.sample("level", dist.Normal(-0.5, 0.5))
    s = pyro.sample("s", dist.HalfNormal(0.2))
    first = pyro.sample("first", dist.LogNormal(math.log(10.0), 0.5))
    steps = pyro.sample("steps", dist.Normal(0.0, s * torch.ones(len(cases))).to_event(1))
    rate = (level + torch.cumsum(steps, -1)).exp()
    susceptible, infected = PEOPLE - first, first
    for t in range(len(cases)):
        new = rate[..., t] * susceptible * infected / PEOPLE
        susceptible, infected = susceptible - new, infected + new - 0.25 * infected
        mean = torch.clamp(new, min=1e-6)
        pyro.sample(f"cases_{t}", dist.GammaPoisson(20.0, 20.0 / mean), obs=cases[t])


CASES = torch.tensor([5.0, 9, 9, 14, 15, 26, 30, 58, 66, 90, 134, 201, 250, 365, 369, 520])


@pytest.mark.slow
def test_the_pilot_of_an_epidemic_is_found_and_bands_are_looked_for_once(monkeypatch):
    """Draws of a wide random walk lie where nobody is left to be infected, and nothing has a slope.

    The likelihood has no bands, which is confirmed for no place where it is known.
    """
    looks = []

    def orders(*args):
        looks.append(args)
        yield from given(*args)

    given = path_bands.orders
    monkeypatch.setattr(path_bands, "orders", orders)
    monkeypatch.setattr(pilot, "_LOOKS", 1)
    marginal = marginalize(epidemic, ["steps"])
    found = pilot.find_pilot(marginal, Arguments((CASES,), {}))
    assert found.distance < 0.05
    marginal.fit(CASES, pilot=found.values)
    assert len(looks) == 1


def walk(width):
    """A random walk that each sum of some states in a row is observed of."""

    def prior(x):
        return -0.5 * (x.square().sum(-1) + x.diff(dim=-1).square().sum(-1))

    def likelihood(x):
        rows = [x[..., i : 31 - width + i] for i in range(width)]
        return -0.5 * sum(rows[1:], start=rows[0]).square().sum(-1)

    return Parts(prior, likelihood)


@pytest.mark.parametrize("width", [1, 3])
def test_known_bands_are_looked_at(width):
    """Where a parameter lets states depend on each other, which did not before, there are more."""
    x, natural = torch.randn(30, dtype=torch.float64), Order(torch.arange(30))
    known = Bands(natural, 2, 1)
    found = find_bands([(walk(width), x)], _Group(), _Layout(x), known)
    assert (found is known) == (width == 1)
    assert found[1:] == (2, width)


class _Group:
    frames, joined, sites = (), (), ("x",)


class _Block:
    frames, start, stop, event = (), 0, 30, torch.Size([30])


class _Layout:
    def __init__(self, example):
        self.example, self.dimension, self.blocks = example, len(example), {"x": _Block}


@pytest.mark.parametrize("is_outside", [True, False])
def test_a_search_begins_at_a_draw_or_beside_the_prior_s_centre(is_outside):
    """Where the draw has no density, or less."""
    x = torch.randn(30, dtype=torch.float64)
    prior = walk(1).prior

    def likelihood(x):
        return torch.where((x.abs().amax(-1) < 1.0) == is_outside, 0.0, -torch.inf)

    start = higher_start(Parts(prior, likelihood), 3.0 * x, centre_of(prior, 3.0 * x, 2))
    torch.testing.assert_close(start, (0.3 if is_outside else 3.0) * x)


def test_a_path_does_not_move_to_where_it_has_no_slope():
    """Beyond zero the density is flat and high, and its slope not a number."""

    def look(x):
        beyond = x[..., 0] > 0.0
        value = torch.where(beyond, 1.0, -0.5 * (x[..., 0] + 0.5).square())
        slope = torch.where(beyond[..., None], torch.nan, -(x + 0.5))
        return Look(value, slope, torch.full((*x.shape, 1), 0.3, dtype=x.dtype))

    found = climb_path(look, torch.tensor([-2.0], dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([-0.5], dtype=torch.float64))


def test_a_climb_rests_where_slopes_do_though_values_tell_of_another_top():
    """An estimate's slope with its proposal held leads to the top; its value is noisy in places."""
    calls = []

    def gradient(position):
        calls.append(position)
        return float(0.5 * position @ position + 0.3 * position.sum()), position.clone()

    top = climb(gradient, torch.tensor([-0.5, -0.5], dtype=torch.float64))
    assert len(calls) <= 6
    assert top.distance <= 0.05 and float(top.position.abs().max()) < 0.1
