"""Paths of which a likelihood with parameters of its own knows much: pilot, starts and moves.

Given its path such a model knows its parameters far better than without: two ways to say the same.
"""

from __future__ import annotations

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import marginalize, whiten
from pyro_hamflow.marginal.fitted import Anchor, is_positive
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start

TIMES, LOADS, ERROR = 40, torch.tensor([0.05, 1.0, 2.0], dtype=torch.float64), 0.01


class Walk(dist.TorchDistribution):
    """A random walk from zero."""

    support = dist.constraints.real_vector
    arg_constraints = {}

    def __init__(self, scale):
        self.scale = scale
        super().__init__(event_shape=(TIMES,), validate_args=False)

    def sample(self, sample_shape=()):
        return (self.scale * torch.randn(TIMES)).cumsum(-1)

    def log_prob(self, x):
        steps = torch.cat([x[..., :1], x.diff(dim=-1)], -1)
        return dist.Normal(0.0, self.scale).log_prob(steps).sum(-1)


def premiums(y):
    """Yields above a level: the more so the less wealth there is."""
    size = pyro.sample("size", dist.LogNormal(0.0, 1.0))
    level = pyro.sample("level", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(math.log(0.1), 0.5))
    wealth = pyro.sample("wealth", Walk(scale))
    mean = level + size * LOADS * (-wealth[..., None]).exp()
    pyro.sample("y", dist.Normal(mean, ERROR).to_event(2), obs=y)


@pytest.fixture(autouse=True)
def doubles():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def yields():
    torch.manual_seed(0)
    wealth = (0.1 * torch.randn(TIMES)).cumsum(0)
    return 0.5 + 1.5 * LOADS * (-wealth)[:, None].exp() + ERROR * torch.randn(TIMES, 3)


def test_the_pilot_is_at_the_top(yields):
    """By Laplace's approximation of the marginal posterior, which whitening climbs."""
    found = marginalize(premiums, ["wealth"]).pilot((yields,), {})
    fit = whiten(premiums, ["wealth"]).fit(yields)
    top = fit.split.values(fit.centre)
    assert float(found["size"] / top["size"]) == pytest.approx(1.0, abs=0.02)
    assert float(found["scale"] / top["scale"]) == pytest.approx(1.0, abs=0.05)
    assert float(found["level"]) == pytest.approx(float(top["level"]), abs=1e-3)


def test_chains_start_where_the_posterior_is(yields):
    """As far from the pilot as draws are, though the level is known to a thousandth."""
    marginal = marginalize(premiums, ["wealth"], num_particles=4)
    target = ModelTarget(marginal, separate_noise=True)
    potential = target.prepare((yields,), {})
    position, noise = target.start(50, None)
    heights = potential.evaluate(position, noise).value
    assert heights.max() - heights.min() < 15.0  # of three numbers
    assert (position.std(0) > 1e-4).all()


def test_starts_outside_the_box_are_drawn_in_to_its_edge():
    potential = Potential(partial(pyro.sample, "x", dist.Normal(torch.zeros(2), 1.0)), (), {})
    covariance = torch.tensor([[1.0, 0.0], [0.0, 1e-8]])
    centre = torch.tensor([3.0, 4.0])
    step = find_start(potential, 400, centre, 0.5, covariance=covariance)[0] - centre
    assert step.abs().max() <= 0.5
    assert (step[:, 0].abs() > 0.4999).double().mean() == pytest.approx(0.617, abs=0.1)
    assert 1e-6 < step[:, 1].std() < 1e-4


def test_a_path_follows_the_logarithms_of_scales(yields):
    """Wealth makes up for any size: its mode moves by the logarithm of it."""
    marginal = marginalize(premiums, ["wealth"], num_particles=1)
    pilot = {"size": torch.tensor(1.9), "level": torch.tensor(0.502), "scale": torch.tensor(0.09)}
    marginal.fit(yields, pilot=pilot)
    (fit,) = marginal.proposal.fitted.values()
    assert "size" in fit.anchor.ratios
    for ratio in (0.7, 1.4):
        there = pilot | {"size": ratio * pilot["size"]}
        torch.manual_seed(0)
        estimates = repeated_estimates(marginal, there, 50, Arguments((yields,), {}))
        assert estimates.sum(-1).var() < 0.5


def test_shifts_by_ratios_have_an_inverse():
    values = {"a": torch.tensor([2.0, 0.5]), "b": torch.tensor(-3.0)}
    anchor = Anchor(values, ("b", "a"), frozenset({"a"}))
    shift = torch.tensor([0.25, 0.1, -0.2])
    moved = anchor.at(shift)
    torch.testing.assert_close(
        moved["a"], torch.tensor([2.0, 0.5]) * torch.tensor([0.1, -0.2]).exp()
    )
    torch.testing.assert_close(anchor.shift(moved), shift)
    slopes = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(anchor.by_ratios(slopes), torch.tensor([[1.0, 2.0, 0.5]]))


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (dist.LogNormal(0.0, 1.0), True),
        (dist.HalfNormal(1.0).expand([3]).to_event(1), True),
        (dist.Normal(0.0, 1.0), False),
        (dist.Beta(1.0, 1.0), False),
        (dist.Pareto(2.0, 1.0), False),
    ],
)
def test_what_is_positive(fn, expected):
    assert is_positive("x", fn) is expected
