"""Models of mixed precision are promoted as torch promotes them; rounding is told."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS, marginalize
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.rounding import describe_ends
from tests.helpers.estimates import AT, assert_unbiased, estimates
from tests.helpers.kinds import long_but

SINGLE, DOUBLE = torch.float32, torch.float64
Y = [0.3, 1.2, -1.0]


def tensor(value, dtype):
    return torch.tensor(value, dtype=dtype)


PRIORS = {
    "normal": lambda mu, own: dist.Normal(tensor(0.0, own), 1.0),
    "of the parameter": lambda mu, own: dist.Normal(mu, tensor(1.0, own)),
    "vector": lambda mu, own: dist.MultivariateNormal(torch.zeros(2).to(own), torch.eye(2).to(own)),
    "log-normal": lambda mu, own: dist.LogNormal(mu, tensor(1.0, own)),
    "gamma": lambda mu, own: dist.Gamma(tensor(2.0, own), 1.0),
    "mixture": lambda mu, own: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(tensor([0.0, 1.0], own), tensor(1.0, own))
    ),
}
TYPES = list(itertools.product((SINGLE, DOUBLE), repeat=3))[:-1]  # all but three times double


def model(y, prior, own, parameter):
    mu = pyro.sample("mu", dist.Normal(tensor(0.0, parameter), 1.0))
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", prior(mu, own))
        x = x @ torch.ones(2, dtype=x.dtype) if x.dim() == 2 else x
        pyro.sample("y", dist.Normal(mu + x, 1.0), obs=y)


@cache
def estimate_and_gradient(prior, types, proposal):
    own, data, parameter = types
    marginal = marginalize(model, ["x"], num_particles=4, proposal=proposal)
    args = (tensor(Y, data), PRIORS[prior], own, parameter)
    marginal.fit(*args, pilot={"mu": tensor(0.2, parameter)})
    potential = Potential(marginal, args, separate_noise=True)
    position = torch.linspace(-0.5, 0.5, potential.dimension).to(potential.example)[None]
    noise = torch.linspace(-1.0, 1.0, potential.noise_dimension).to(potential.example)[None]
    return [part.double() for part in potential.gradients(position, noise)]


def is_quick(case):
    """Two ways to mix types for each prior, and each way for one or two priors."""
    prior, types = case
    return (list(PRIORS).index(prior) + TYPES.index(types)) % 4 == 0


@pytest.mark.parametrize("proposal", ["auto", "prior"])
@pytest.mark.parametrize(
    ("prior", "types"), long_but(is_quick, itertools.product(PRIORS, TYPES)), ids=str
)
def test_mixed_precision_is_promoted(prior, types, proposal):
    """The estimate and its gradient are those of double precision, roughly."""
    found = estimate_and_gradient(prior, types, proposal)
    expected = estimate_and_gradient(prior, (DOUBLE, DOUBLE, DOUBLE), proposal)
    for mixed, double in zip(found, expected, strict=True):
        torch.testing.assert_close(mixed, double, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_two_sites_of_different_types(proposal):
    def two(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        with pyro.plate("subject", len(y)):
            x = pyro.sample("x", dist.Normal(mu, s))
            w = pyro.sample("w", dist.Normal(tensor(0.0, SINGLE), tensor(0.7, SINGLE)))
            pyro.sample("y", dist.Normal(x + w, 0.9), obs=y)

    marginal = marginalize(two, ["x", "w"], num_particles=8, proposal=proposal)
    marginal.fit(tensor(Y, DOUBLE), pilot=AT)
    law = dist.Normal(AT["mu"], (AT["s"] ** 2 + 0.49 + 0.81).sqrt())
    found = estimates(marginal, AT, tensor(Y, DOUBLE))["x_w"]
    assert_unbiased(found, law.log_prob(tensor(Y, DOUBLE)))


def test_sites_of_a_plain_model_keep_their_types():
    def regression(y):
        slopes = pyro.sample("slopes", dist.Normal(torch.zeros(2).to(SINGLE), 1.0).to_event(1))
        scale = pyro.sample("scale", dist.HalfNormal(tensor(1.0, DOUBLE)))
        with pyro.plate("row", len(y)):
            pyro.sample("y", dist.Normal(torch.ones(len(y), 2).to(SINGLE) @ slopes, scale), obs=y)

    mcmc = MCMC(HMC(regression), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(tensor(Y, SINGLE))
    types = {name: value.dtype for name, value in mcmc.get_samples().items()}
    assert types == {"slopes": SINGLE, "scale": DOUBLE}


def counts(y, dtype):
    rate = pyro.sample("rate", dist.LogNormal(tensor(13.8, dtype), 1.0))
    with pyro.plate("row", len(y)):
        pyro.sample("y", dist.Poisson(rate), obs=y)


def test_rounding_of_large_counts_is_told():
    y = tensor([1.0e6, 1.0e6 + 300], SINGLE)
    match = r"site 'y' is computed in torch.float32 and rounded by about 0.8\d, since counts of 1e"
    with pytest.warns(RuntimeWarning, match=match):
        Potential(counts, (y, SINGLE))
    Potential(counts, (y.double(), DOUBLE))  # warnings are errors here
    Potential(counts, (y / 1000, SINGLE))


def test_rounding_of_long_sums_is_told():
    def many(count):
        mean = pyro.sample("mean", dist.Normal(tensor(0.0, SINGLE), 1.0))
        with pyro.plate("row", count):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=torch.zeros(count, dtype=SINGLE))

    match = "site 'y' is computed in .* since a sum over so many needs more"
    with pytest.warns(RuntimeWarning, match=match):
        Potential(many, (2_000_000,))
    Potential(many, (1000,))


def test_rounding_in_a_marginal_model_is_told():
    def mixed(y):
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", dist.Normal(tensor(math.log(1e6), SINGLE), 0.1))
            pyro.sample("y", dist.Poisson(x.exp()), obs=y)

    with pytest.warns(RuntimeWarning, match="log density of site 'y' .* counts of 1e"):
        marginalize(mixed, ["x"]).plan(tensor([1.0e6], SINGLE))


def share(dtype, concentration):
    both = tensor(concentration, dtype)
    pyro.sample("share", dist.Beta(both, both))


@pytest.mark.parametrize(
    ("dtype", "concentration", "told"),
    [(SINGLE, 0.1, True), (SINGLE, 1.0, False), (DOUBLE, 0.1, False)],
)
def test_draws_rounded_to_an_end_are_told(dtype, concentration, told):
    """A fifth of the mass lies within a rounding error of one, and most of it is lost there."""
    mcmc = MCMC(NUTS(share), num_samples=60, warmup_steps=60, num_chains=100, seed=0)
    mcmc.run(dtype, concentration)
    found = [m for m in mcmc.messages if "'share' are rounded by torch.float32 to an end" in m]
    assert bool(found) == told
    mean = float(mcmc.get_samples()["share"].mean())
    assert (mean < 0.47) == told  # 0.5 of the model


def test_ends_are_told_apart_at_any_shape():
    def model():
        pyro.sample("x", dist.Uniform(tensor([0.0, 0.0], SINGLE), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(tensor(0.0, SINGLE), 1.0))

    sites = Potential(model).sites
    fine = torch.tensor([[0.0, -70.0, 100.0], [10.0, -3.0, 1e4]], dtype=SINGLE)
    assert describe_ends(sites, [fine]) is None
    coarse = fine.clone()
    coarse[1, 0] = 17.5
    for stretches in ([coarse], [coarse[:1], coarse[1:]]):
        told = describe_ends(sites, stretches)
        assert told.startswith("0.5 of the draws of 'x' are rounded")
