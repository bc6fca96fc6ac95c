"""Points that are moved to where an element's weights are: unbiased, and worth the move."""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.results.moved import MovedPoints, gather, movable
from pyro_hamflow.results.pointwise import WANTED_ERROR, pointwise
from pyro_hamflow.results.terms import find_terms
from tests.helpers.kinds import long_but

VISITS = 6


def logit(y):
    """Members at nearly all of their visits, or at none: skewed, and far from the prior's mean."""
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    spread = pyro.sample("spread", dist.HalfNormal(3.0))
    with pyro.plate("group", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mean, spread))
        with pyro.plate("visit", y.shape[-1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x), obs=y)


Y = torch.tensor([[1.0] * k + [0.0] * (VISITS - k) for k in (0, 1, 3, 5, 6)])


def by_quadrature(mean, spread):
    """Log densities of the groups, parameters in rows."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(150)
    x = mean[..., None, None] + spread[..., None, None] * torch.tensor(nodes)
    terms = dist.Bernoulli(logits=x[..., None]).log_prob(Y.double()[:, None, :]).sum(-1)
    return (terms + torch.tensor(weights).log()).logsumexp(-1) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_elements_that_a_proposal_fits_badly_are_estimated_from_few_moved_points(proposal):
    torch.set_default_dtype(torch.float64)
    marginal = phf.marginalize(logit, ["x"], num_particles=16, proposal=proposal)
    y = Y.double()
    far = {"mean": torch.tensor(-1.0), "spread": torch.tensor(0.4)}
    marginal.fit(y, pilot=far)
    potential = Potential(marginal, (y,), separate_noise=True)
    free = torch.randn(1, 300, 2, generator=torch.Generator().manual_seed(0)) * 0.2
    free = free + torch.tensor([1.5, 1.3])  # where effects spread nine times as far
    values = potential.constrain(free)
    truth = by_quadrature(values["mean"], values["spread"])
    found = pointwise(potential, marginal, free, 1)
    error = (found.values[0][..., 0] - truth)[0]
    assert found.error <= WANTED_ERROR
    assert error.square().mean(0).sqrt().max() < WANTED_ERROR
    assert found.points <= 64 and error.mean().abs() < 0.002


def pair(y):
    """Two effects of an element, the second's prior moved by the first; and a mixture."""
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.tensor([-1.0, 1.0]), torch.tensor([0.5, 1.0])),
    )
    with pyro.plate("group", 2):
        a = pyro.sample("a", mixture)
        b = pyro.sample("b", dist.Normal(0.5 * a, scale))
        pyro.sample("y", dist.Normal(a + b, 0.4), obs=y)


def exact_pair(scale, y):
    parts = []
    for weight, loc, own in ((0.3, -1.0, 0.5), (0.7, 1.0, 1.0)):
        variance = (1.5 * own) ** 2 + scale**2 + 0.4**2
        parts.append(math.log(weight) + dist.Normal(1.5 * loc, variance**0.5).log_prob(y))
    return torch.logaddexp(*parts)


@pytest.mark.parametrize("proposal", long_but(["prior"], ["prior", "laplace"]))
def test_moved_points_are_unbiased_wherever_they_are_moved(proposal):
    torch.set_default_dtype(torch.float64)
    y = torch.tensor([0.5, -2.5])
    marginal = phf.marginalize(pair, ["a", "b"], num_particles=16, proposal=proposal)
    position = torch.tensor([0.2])
    source = Potential(marginal, (y,), separate_noise=True)
    truth = exact_pair(position.exp(), y)
    first, second = (MovedPoints(source, model, 16) for model in movable(source, marginal, 16))
    terms = find_terms(second.potential.trace(position, second.potential.vectors(1)[1][0]))
    generator = torch.Generator().manual_seed(0)

    def runs(points, count, places):
        shift = torch.randn(count, points.shift_dimension, generator=generator)
        results = zip(*(points.run(terms, position, row, *places) for row in shift), strict=True)
        return [torch.stack(result) for result in results]

    def error(estimates):
        relative = (estimates - truth).exp()
        assert ((relative.mean(0) - 1).abs() < 4 * relative.std(0) / len(relative) ** 0.5).all()
        return relative.std(0).max()

    poor = [torch.randn(p.shape, generator=generator) for p in second.parts]
    roots = [torch.tensor([[0.7, 0.0], [0.4, 0.9]]).expand(*p.shape, 2) for p in second.parts]
    before = error(runs(second, 400, poor + roots)[0])
    estimates, *moments = runs(first, 30, [])
    error(estimates)
    good = [place[0] for place in gather([moment[None] for moment in moments])]
    assert [tuple(place.shape) for place in good[: len(second.parts)]] == [
        tuple(part.shape) for part in second.parts
    ]
    assert error(runs(second, 400, good)[0]) < before / 2


def growth(y):
    """A population that levels off, whose sizes are a path of sixteen skewed numbers."""
    spread = pyro.sample("spread", dist.HalfNormal(0.5))
    size = torch.ones((), dtype=y.dtype)
    for t in pyro.markov(range(len(y))):
        mean = size.log() + 1.2 * (1.0 - size / 3.0)
        size = pyro.sample(f"size_{t}", dist.LogNormal(mean, spread))
        pyro.sample(f"y_{t}", dist.Poisson(5.0 * size), obs=y[t])


def test_paths_stay_where_their_gaussian_is():
    """Moved points lay twice as far in each of sixteen directions, and took 512 for this error."""
    torch.set_default_dtype(torch.float64)
    y = torch.tensor([9.0, 11, 16, 13, 18, 15, 12, 14, 17, 16, 13, 15, 19, 14, 12, 16])
    marginal = phf.marginalize(growth, ["size"])
    marginal.fit(y, pilot={"spread": torch.tensor(0.25)})
    potential = Potential(marginal, (y,), separate_noise=True)
    free = torch.linspace(-2.5, -0.7, 100, dtype=torch.float64).reshape(1, 100, 1)
    found = pointwise(potential, marginal, free, 1)
    assert found.error <= WANTED_ERROR and found.points <= 128
