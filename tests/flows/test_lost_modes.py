"""Modes that a guide has lost are told of, with how much they hold; and no others."""

from __future__ import annotations

import math
import re
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_hamflow import (
    AutoFlow,
    AutoNeuralHamiltonianFlow,
    ForwardKL,
    fit_guide,
    importance_sample,
    marginalize,
)
from pyro_hamflow.flows.descent import Descent
from pyro_hamflow.flows.lost_modes import describe_lost_modes
from pyro_hamflow.model.potential import Potential
from tests.helpers.guided import Y, conjugate
from tests.helpers.targets import effects
from tests.helpers.zuko_flows import FLOWS


def of_density(log_density, dimension, scale=5.0):
    """A model of this posterior, whose prior is wide and normal."""

    def model():
        prior = dist.Normal(torch.zeros(dimension), scale).to_event(1)
        x = pyro.sample("x", prior)
        pyro.factor("density", log_density(x) - prior.log_prob(x))

    return model


def normal(x, mean, scale):
    return dist.Normal(mean, scale).log_prob(x).sum(-1)


def double_well(x):
    return -(x[..., 0] ** 4) + 6 * x[..., 0] ** 2 + 0.5 * x[..., 0] - 0.5 * x[..., 1] ** 2


def two_normals(share, low, high):
    """Of (mean, scale) each."""

    def log_density(x):
        parts = math.log(share) + normal(x, *low), math.log(1 - share) + normal(x, *high)
        return torch.logaddexp(*parts)

    return log_density


def mirrored():
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean.abs(), 0.1), obs=torch.tensor(1.0))


def labels(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    with pyro.plate("data", len(y)):
        kinds = dist.Categorical(torch.tensor([0.5, 0.5]))
        pyro.sample("y", dist.MixtureSameFamily(kinds, dist.Normal(mean, 1.0)), obs=y)


TWO_GROUPS = torch.cat([torch.linspace(-3.5, -1.0, 15), torch.linspace(1.0, 3.5, 15)])

# The model, its arguments, and how much lies outside of the mode that a search for one finds.
SEVERAL = {
    "double well": (of_density(double_well, 2, 2.0), (), {0.844, 0.156}),
    "three wells": (
        of_density(lambda x: double_well(x.reshape(-1, 3, 2)).sum(-1), 6, 2.0),
        (),
        None,
    ),
    "unequal": (of_density(two_normals(0.9, (3.0, 0.5), (-3.0, 0.5)), 1), (), {0.1, 0.9}),
    "16 dimensions": (of_density(two_normals(0.25, (-2.5, 0.7), (2.5, 0.7)), 16), (), {0.25, 0.75}),
    "wide and narrow": (of_density(two_normals(0.5, (0.0, 0.2), (4.0, 1.5)), 2), (), {0.5}),
    "mirrored": (mirrored, (), {0.5}),
    "labels": (labels, (TWO_GROUPS,), {0.5}),
}


def share_told(message):
    return int(re.search(r"about (\d+) % of the posterior", message)[1]) / 100


@pytest.mark.parametrize("name", SEVERAL)
def test_a_lost_mode_is_told_of(name):
    model, args, shares = SEVERAL[name]
    guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8), num_steps=3)
    with pytest.warns(
        UserWarning, match="lost modes .* `AnnealedSampler`, or .* `FlowNUTS`"
    ) as said:
        fit_guide(model, guide, *args, num_steps=100, num_particles=32, seed=0)
    told = share_told(str(said[0].message))
    assert told > 0.9 if shares is None else any(abs(told - share) < 0.1 for share in shares)
    found = importance_sample(model, guide, *args, num_samples=2000, seed=0)
    assert abs(share_told(found.message) - told) < 0.02
    assert found.pareto_k < 0.7 or name == "double well"  # which by itself does not tell


def test_a_guide_of_the_double_well_that_has_both_is_not_blamed():
    model = of_density(double_well, 2, 2.0)
    line = torch.linspace(-4.0, 4.0, 8001)
    density = (-(line**4) + 6 * line**2 + 0.5 * line).exp()
    first = line[torch.multinomial(density, 3000, replacement=True)]
    draws = {"x": torch.stack([first, torch.randn(3000)], -1)}
    guide = AutoFlow(model, FLOWS["NSF"], start=dist.Normal(torch.zeros(2), 2.0).to_event(1))
    fit_guide(model, guide, loss=ForwardKL(draws), num_steps=400, seed=0)
    found = importance_sample(model, guide, num_samples=4000, seed=0)
    assert found.lost is None
    assert abs(found.log_evidence - 10.2935) < 4 * found.log_evidence_error


def test_a_mode_that_few_descents_end_in_is_found():
    """Both wells of a guide that has the larger one alone."""

    class Larger:
        def prepare(self):
            pass

        def draw(self, count):
            position = torch.randn(count, 2) * torch.tensor([0.2, 1.0]) + torch.tensor([1.75, 0.0])
            return position, self.log_ratio(position)

        def log_ratio(self, position):
            scale = torch.tensor([0.2, 1.0])
            return normal(position, torch.tensor([1.75, 0.0]), scale)

    told = describe_lost_modes(Larger(), Potential(of_density(double_well, 2, 2.0)))
    assert abs(share_told(told) - 0.156) < 0.02


def test_a_share_that_weights_make_up_for_is_not_lost():
    """The guide has a hundredth of a mode of one half, and 20,000 draws."""

    class Mixture:
        def prepare(self):
            pass

        def draw(self, count):
            right = torch.rand(count, 1) < 0.01
            position = torch.where(right, 3.0, -3.0) + 0.6 * torch.randn(count, 1)
            return position, self.log_ratio(position)

        def log_ratio(self, position):
            return two_normals(0.01, (3.0, 0.6), (-3.0, 0.6))(position)

    model = of_density(two_normals(0.5, (3.0, 0.5), (-3.0, 0.5)), 1)
    guide = Mixture()
    assert share_told(describe_lost_modes(guide, Potential(model))) == 0.5
    found = importance_sample(model, guide, num_samples=20_000, seed=0)
    assert found.lost is None
    assert abs(found.log_evidence) < 0.2


SCHOOLS = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])
ERRORS = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])


def schools(*, centred):
    mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        if centred:
            effect = pyro.sample("effect", dist.Normal(mean, spread))
        else:
            effect = mean + spread * pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(effect, ERRORS), obs=SCHOOLS)


def shape_and_rate():
    shape, rate = (pyro.sample(name, dist.Gamma(2.0, 1.0)) for name in ("shape", "rate"))
    with pyro.plate("data", 10):
        pyro.sample("y", dist.Gamma(shape, rate), obs=torch.linspace(0.5, 3.0, 10))


def shares():
    share = pyro.sample("share", dist.Dirichlet(torch.ones(4)))
    pyro.sample("y", dist.Multinomial(20, share), obs=torch.tensor([10.0, 5, 4, 1]))


def funnel(x):
    return normal(x[..., :1], 0.0, 1.0) + normal(x[..., 1:], 0.0, (0.5 * x[..., :1]).exp())


def banana(x):
    return normal(x[..., :1], 0.0, 1.0) + normal(x[..., 1:], x[..., :1].square(), 0.5)


ONE = {
    "normal, 50 dimensions": of_density(lambda x: normal(x, 1.0, torch.linspace(0.1, 3.0, 50)), 50),
    "banana": of_density(banana, 2),
    "funnel": of_density(funnel, 8),
    "Cauchy": of_density(lambda x: dist.Cauchy(0.0, 1.0).log_prob(x).sum(-1), 3),
    "schools": lambda: schools(centred=False),
    "centred schools": lambda: schools(centred=True),
    "gamma": shape_and_rate,
    "shares": shares,
}


@pytest.mark.parametrize("name", ONE)
def test_posteriors_of_one_mode_lose_none(name):
    """Whatever the guide is like: trained a little, and too narrow."""
    model = ONE[name]
    guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8), num_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_guide(model, guide, num_steps=30, num_particles=32, seed=0)
    narrow = AutoNormal(model, init_scale=0.05)
    assert importance_sample(model, narrow, num_samples=500, seed=0).lost is None


def test_noise_is_held():
    model = marginalize(effects, ["x"], num_particles=4)
    guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8), num_steps=3)
    guide.prepare(Y)
    assert describe_lost_modes(guide, Potential(model, (Y,), separate_noise=True)) is None


def test_types_may_differ():
    """The guide's positions are single, and what the model makes of them is double."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(1, dtype=torch.float32), 4.0).to_event(1))
        pyro.factor("modes", two_normals(0.5, (3.0, 0.5), (-3.0, 0.5))(x.double()))

    settings = {"hidden": (8, 8), "num_steps": 3}
    guide = AutoNeuralHamiltonianFlow(model, **settings)
    guide.prepare()
    position, _ = guide.draw(2)
    told = describe_lost_modes(guide, Potential(model, separate_noise=True))
    assert position.dtype == torch.float32 and abs(share_told(told) - 0.5) < 0.05


def test_looking_changes_no_draws():
    results = []
    for looks in (False, True):
        guide = AutoNeuralHamiltonianFlow(conjugate, hidden=(8, 8), num_steps=3)
        guide.prepare(Y)
        torch.manual_seed(0)
        if looks:
            describe_lost_modes(guide, Potential(conjugate, (Y,), separate_noise=True))
        results.append(torch.rand(3))
    assert torch.equal(*results)


# --- descents -----------------------------------------------------------------------------------


def test_descents_end_in_minima():
    matrix = torch.randn(6, 6)
    precision = matrix @ matrix.mT + torch.diag(torch.logspace(-1, 2, 6))

    def log_density(x):
        offset = x - torch.arange(6.0)
        return -0.5 * (offset @ precision * offset).sum(-1)

    potential = Potential(of_density(log_density, 6))
    descent = Descent(potential, torch.ones(6), torch.zeros(1, 0))
    ends, value, gradient, spread = descent.run(5.0 * torch.randn(20, 6))
    expected, _ = descent.value_and_gradient(torch.arange(6.0).expand(20, 6))
    assert ((value - expected).abs() < 0.05).all() and gradient.isfinite().all()
    hessian = descent.hessian(ends[0], spread[0])
    torch.testing.assert_close(hessian, precision, rtol=1e-4, atol=1e-4)


def test_descents_stay_where_there_is_no_number():
    def log_density(x):
        return torch.where(x[..., 0] > 4.0, math.nan, -x.square().sum(-1))

    descent = Descent(Potential(of_density(log_density, 2)), torch.ones(2), torch.zeros(1, 0))
    start = torch.tensor([[5.0, 0.0], [3.9, 1.0]])
    ends, value, *_ = descent.run(start)
    assert torch.equal(ends[0], start[0]) and value[0] == torch.inf
    assert ends[1].norm() < 0.1
