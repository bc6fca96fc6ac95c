"""Chains that start anywhere tell luck from short moves, where a population descends from few."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, FlowNUTS
from pyro_hamflow.mcmc.adaptation.flow import FlowSearch
from pyro_hamflow.mcmc.adaptation.walkers import Walkers

GROUPS, ROWS = 30, 8


class MadeMore(Exception):
    """A whole population was to be moved from the prior."""


def answers():
    noise = torch.Generator().manual_seed(1)
    effect = torch.randn(GROUPS, generator=noise)
    x = torch.randn(GROUPS, ROWS, generator=noise)
    chance = torch.sigmoid(0.3 + effect[:, None] - 0.8 * x)
    return x.double(), torch.bernoulli(chance, generator=noise).double()


def grouped(x, y):
    """Answers of groups: one mode."""
    zero = x.new_zeros(())
    mean, slope = (pyro.sample(name, dist.Normal(zero, 2.0)) for name in ("mean", "slope"))
    scale = pyro.sample("scale", dist.HalfCauchy(zero + 1.0))
    with pyro.plate("groups", GROUPS):
        effect = pyro.sample("effect", dist.Normal(zero, 1.0))
    logits = mean + scale * effect[:, None] + slope * x
    with pyro.plate("of_groups", GROUPS, dim=-2), pyro.plate("rows", ROWS, dim=-1):
        pyro.sample("y", dist.Bernoulli(logits=logits), obs=y)


def factors():
    noise = torch.Generator().manual_seed(3)
    loading, factor = torch.randn(6, generator=noise), torch.randn(GROUPS, generator=noise)
    return (factor[:, None] * loading + 0.5 * torch.randn(GROUPS, 6, generator=noise)).double()


def loaded(y):
    """A factor and its loadings, of either sign: two modes."""
    zero = y.new_zeros(())
    loading = pyro.sample("loading", dist.Normal(zero, 1.0).expand([6]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(zero + 1.0))
    with pyro.plate("people", GROUPS):
        factor = pyro.sample("factor", dist.Normal(zero, 1.0))
        pyro.sample("y", dist.Normal(factor[:, None] * loading, scale).to_event(1), obs=y)


def run_of(model, *data, seed=0):
    mcmc = MCMC(FlowNUTS(model), 20, num_chains=8, seed=seed, disable_progbar=True)
    mcmc.run(*data)
    return mcmc


@pytest.fixture
def in_haste(monkeypatch):
    def population(self, first):
        raise MadeMore

    monkeypatch.setattr(FlowSearch, "_population", population)


@pytest.mark.usefixtures("in_haste")
def test_groups_of_one_mode_need_no_second_population():
    mcmc = run_of(grouped, *answers())
    assert any("local moves alone forget" in said for said in mcmc.messages)


@pytest.mark.usefixtures("in_haste", "far_starts_stay")
def test_it_is_not_told_where_steps_do_not_suit_those_far_away(monkeypatch):
    monkeypatch.setattr(Walkers, "approach", lambda self, most, level: self.move(most))
    with pytest.raises(MadeMore):
        run_of(grouped, *answers())


@pytest.mark.usefixtures("in_haste")
@pytest.mark.parametrize("seed", [0, 2])
def test_two_signs_do(seed):
    with pytest.raises(MadeMore):
        run_of(loaded, factors(), seed=seed)
