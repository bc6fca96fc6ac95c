"""Loops of states: in panels, ragged by masks, with plates inside, and in single precision."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch

from pyro_hamflow import marginalize
from pyro_hamflow.marginal.proposals.path import PathProposal
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.programs import banded_source

LENGTHS = torch.tensor([18, 12, 5])
AT = {"q": torch.tensor(0.4, dtype=torch.float64), "s": torch.tensor(0.6, dtype=torch.float64)}


def scales(y):
    one = torch.ones((), dtype=y.dtype)
    return pyro.sample("q", dist.LogNormal(-one, 0.7)), pyro.sample("s", dist.LogNormal(-one, 0.7))


def masked_everywhere(y):
    q, s = scales(y)
    x = torch.zeros_like(y[0])
    with pyro.plate("units", 3):
        for t in pyro.markov(range(len(y))):
            with poutine.mask(mask=t < LENGTHS):
                x = pyro.sample(f"x_{t}", dist.Normal(x, q))
                pyro.sample(f"y_{t}", dist.Normal(x, s), obs=y[t])


def plate_inside(y):
    q, s = scales(y)
    x, units = torch.zeros_like(y[0]), pyro.plate("units", 3)
    for t in pyro.markov(range(len(y))):
        with units:
            x = pyro.sample(f"x_{t}", dist.Normal(x, q))
            with poutine.mask(mask=t < LENGTHS):
                pyro.sample(f"y_{t}", dist.Normal(x, s), obs=y[t])


def plate_of_observations(y):
    q, s = scales(y)
    x = torch.zeros_like(y[0, 0])
    for t in pyro.markov(range(len(y))):
        x = pyro.sample(f"x_{t}", dist.Normal(x, q))
        with pyro.plate(f"observations_{t}", 3):
            pyro.sample(f"y_{t}", dist.Normal(x, s), obs=y[t])


def covariance(length):
    times = torch.arange(1, length + 1, dtype=torch.float64)
    return AT["q"] ** 2 * torch.minimum(times[:, None], times)


def log_density(values, matrix):
    matrix = matrix + AT["s"] ** 2 * torch.eye(len(values)).to(values)
    return dist.MultivariateNormal(torch.zeros_like(values), matrix).log_prob(values)


def loops_within_a_loop(y):
    """Series of different lengths, one after the other."""
    q, s = scales(y)
    for i, length in enumerate(LENGTHS.tolist()):
        x = torch.zeros_like(y[0, 0])
        for t in range(length):
            x = pyro.sample(f"x_{i}_{t}", dist.Normal(x, q))
            pyro.sample(f"y_{i}_{t}", dist.Normal(x, s), obs=y[t, i])


@pytest.mark.parametrize(
    "model", [masked_everywhere, plate_inside, plate_of_observations, loops_within_a_loop]
)
def test_gaussian_panels_are_exact(model):
    torch.manual_seed(0)
    y = 0.5 * torch.randn(18, 3, dtype=torch.float64).cumsum(0)
    if model is plate_of_observations:
        whole = covariance(18).repeat_interleave(3, 0).repeat_interleave(3, 1)
        expected = log_density(y.reshape(-1), whole)[None]
    else:
        lengths = LENGTHS.tolist()
        parts = [log_density(y[:n, i], covariance(n)) for i, n in enumerate(lengths)]
        expected = torch.stack(parts)
        if model is loops_within_a_loop:  # in no plate, they are one estimate
            expected = expected.sum(0, keepdim=True)
    marginal = marginalize(model, ["x"], num_particles=1)
    marginal.fit(y, pilot={"q": torch.tensor(0.7).double(), "s": torch.tensor(0.5).double()})
    found = repeated_estimates(marginal, AT, 3, Arguments((y,), {}))
    torch.testing.assert_close(found, expected.expand_as(found), rtol=0.0, atol=1e-10)


@pytest.mark.parametrize("length, mixed", [(3, False), (6, False), (6, True)])
def test_short_loops_are_paths(length, mixed):
    """But for a few sites, and for mixtures; one particle is exact for a Gaussian path."""

    def model(y):
        q = pyro.sample("q", dist.LogNormal(0.0, 0.5))
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        x = torch.zeros(3, dtype=torch.float64)
        with pyro.plate("series", 3):
            for t in pyro.markov(range(len(y))):
                step = dist.Normal(x, q)
                if mixed:
                    both = dist.Normal(x[..., None], torch.stack([q, 2.0 * q]))
                    step = dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), both)
                x = pyro.sample(f"x_{t}", step)
                pyro.sample(f"y_{t}", dist.Normal(x, s), obs=y[t])

    torch.manual_seed(0)
    y = 0.5 * torch.randn(length, 3, dtype=torch.float64).cumsum(0)
    marginal = marginalize(model, ["x"], num_particles=1 if not mixed else 64)
    marginal.fit(y, pilot={"q": torch.tensor(0.7).double(), "s": torch.tensor(0.5).double()})
    is_path = isinstance(marginal.proposal, PathProposal)
    assert is_path == (length > 3 and not mixed)
    if is_path:
        expected = torch.stack([log_density(y[:, i], covariance(length)) for i in range(3)])
        found = repeated_estimates(marginal, AT, 3, Arguments((y,), {}))
        torch.testing.assert_close(found, expected.expand_as(found), rtol=0.0, atol=1e-10)


def test_effects_that_a_short_loop_draws_apart_are_no_path():
    def model(y):
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        for i in range(len(y)):
            x = pyro.sample(f"x_{i}", dist.Normal(0.0, s))
            pyro.sample(f"y_{i}", dist.Poisson(x.exp()), obs=y[i])

    marginal = marginalize(model, ["x"])
    marginal.plan(torch.arange(6.0))
    assert not isinstance(marginal.proposal, PathProposal)


def single(y):
    scale, x = pyro.sample("scale", dist.HalfNormal(1.0)), torch.zeros(())
    for t in range(len(y)):
        x = pyro.sample(f"x_{t}", dist.Normal(0.8 * x, scale))
        pyro.sample(f"y_{t}", dist.Normal(x, 0.5), obs=y[t])


def test_programs_of_a_path_are_those_of_its_precision(monkeypatch):
    """The search for the pilot, in double precision, has programs of its own."""
    types, call = set(), banded_source.call

    def seen(name, sizes, *tensors):
        types.add(frozenset(tensor.dtype for tensor in tensors))
        return call(name, sizes, *tensors)

    monkeypatch.setattr(banded_source, "call", seen)
    torch.set_default_dtype(torch.float32)
    y = torch.linspace(-1.0, 1.0, 12).sin()
    marginal = marginalize(single, ["x"])
    pilot = marginal.prepare((y,), {}).pilot
    assert types == {frozenset({torch.float64}), frozenset({torch.float32})}
    marginalize(single, ["x"], proposal=marginal.proposal).fit(y, pilot=pilot)
    assert types == {frozenset({torch.float64}), frozenset({torch.float32})}
