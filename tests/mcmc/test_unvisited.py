"""Modes where no chain has been are told of, though chains agree; and no others are."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import HMC, MCMC, NUTS
from pyro_hamflow.mcmc import unvisited


def two_modes(zero):
    """A quarter of the posterior lies about -4, more widely, and the rest about 2."""
    x = pyro.sample("x", dist.StudentT(3.0, zero, 2.0).expand([4]).to_event(1))
    near, far = -2.0 * (x - 2.0).square().sum(), -0.5 * (x + 4.0).square().sum()
    pyro.factor("modes", torch.logaddexp(near, far))


def schools(zero):
    y = zero + torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
    scale = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])
    mean = pyro.sample("mean", dist.Normal(zero, 5.0))
    spread = pyro.sample("spread", dist.HalfCauchy(zero + 5.0))
    with pyro.plate("schools", 8):
        effect = pyro.sample("effect", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(mean + spread * effect, scale), obs=y)


def neck(zero):
    """Descents go down it and end nowhere."""
    v = pyro.sample("v", dist.Normal(zero, 3.0))
    pyro.sample("x", dist.Normal(zero, (0.5 * v).exp()).expand([4]).to_event(1))


def told_by(kernel, dtype=torch.float64, **settings):
    mcmc = MCMC(kernel, 1000, num_chains=4, seed=0, disable_progbar=True, **settings)
    mcmc.run(torch.zeros((), dtype=dtype))
    return mcmc, [said for said in mcmc.messages if "modes where no chain has been" in said]


START = {"x": torch.full((4, 4), -4.0)}


@pytest.mark.parametrize("make", [NUTS, lambda model: HMC(model, engine="torch")])
def test_chains_that_agree_in_the_wrong_mode_are_told(make):
    mcmc, told = told_by(make(two_modes), initial_params=START)
    assert mcmc.report["max_rhat"] < 1.01
    assert "with about 75% of it, the largest at x = [1." in told[0]
    assert "`FlowNUTS`" in told[0]
    assert abs(mcmc.report["unvisited"] - 0.75) < 0.05


def test_descents_from_the_runs_own_draws_alone_find_nothing(monkeypatch):
    def at_draws(potential, drawn, count):
        return drawn[torch.randint(len(drawn), (count,))]

    monkeypatch.setattr(unvisited, "_starts", at_draws)
    assert not told_by(NUTS(two_modes), initial_params=START)[1]


def test_modes_that_chains_have_been_in_are_not_told():
    start = {"x": START["x"] * torch.tensor([1.0, 1.0, -0.5, -0.5])[:, None]}
    mcmc, told = told_by(NUTS(two_modes), initial_params=start)
    assert not told
    assert mcmc.report["max_rhat"] > 1.5


@pytest.mark.parametrize("model", [schools, neck])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_mode_is_not_told(model, dtype):
    assert not told_by(NUTS(model), dtype)[1]


def test_models_that_fail_at_draws_of_their_prior_keep_their_draws():
    def model(zero):
        r = pyro.sample("r", dist.Normal(zero, 1.0))
        covariance = torch.stack([torch.stack([zero + 1.0, r]), torch.stack([r, zero + 1.0])])
        law = dist.MultivariateNormal(zero.expand(2), covariance)  # where -1 < r < 1 alone
        pyro.sample("y", law, obs=zero + torch.tensor([0.3, 0.9]))

    mcmc, told = told_by(NUTS(model))
    assert mcmc.get_samples()["r"].abs().max() < 1.0
    assert not told


def test_short_runs_are_not_looked_at(monkeypatch):
    monkeypatch.setattr(unvisited, "find_modes", None)
    mcmc = MCMC(NUTS(two_modes), 50, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run(torch.zeros(()).double())
