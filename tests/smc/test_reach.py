"""A proposal that was fitted at one mode and hides the others is noticed, and replaced."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, AnnealedSampler, FlowNUTS, marginalize
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.smc.reach import extend_reach

GROUPS, EACH, ERROR = 12, 8, 0.5


def two_lines(x, y):
    """Each group follows one of two lines; labels may be exchanged."""
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    lines = dist.Categorical(torch.tensor([0.5, 0.5]))
    with pyro.plate("group", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, 0.4))
        mean = effect[..., None, None] + slope[:, None] * x[..., None, :]
        pyro.sample("y", dist.MixtureSameFamily(lines, dist.Normal(mean, ERROR).to_event(1)), obs=y)


def counts(x, y):
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("group", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        rate = (base + slope * x + effect[..., None]).exp()
        pyro.sample("y", dist.Poisson(rate).to_event(1), obs=y)


def switches(x, y):
    base = pyro.sample("base", dist.Normal(0.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 2.0))
    spread = pyro.sample("spread", dist.HalfNormal(1.0))
    with pyro.plate("group", len(x)):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        logits = base + slope * x + effect[..., None]
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=y)


def grouped():
    """Covariates, and effects of groups."""
    torch.manual_seed(7)
    return torch.randn(GROUPS, EACH), 0.4 * torch.randn(GROUPS, 1)


def on_two_lines():
    x, effect = grouped()
    slopes = torch.where(torch.arange(GROUPS) % 2 == 0, -0.9, 0.9)[:, None]
    return x, slopes * x + effect + ERROR * torch.randn(GROUPS, EACH)


def said_of(model, data, **choices):
    target = ModelTarget(marginalize(model, ["effect"], **choices), separate_noise=True)
    target.prepare(data, {})
    return extend_reach(target), target.model.proposal.name


def test_hidden_modes_are_told_of():
    said, proposal = said_of(two_lines, on_two_lines())
    assert said is not None and "modes there would be lost; particles come from the prior" in said
    assert proposal == "prior"


def test_a_proposal_of_the_users_stays():
    said, proposal = said_of(two_lines, on_two_lines(), proposal="laplace")
    assert said is not None and said.endswith("take `proposal='prior'`, or more particles.")
    assert proposal == "laplace"


@pytest.mark.parametrize("level", [0.0, pytest.param(4.0, marks=pytest.mark.slow)])
def test_counts_have_one_mode(level):
    x, effect = grouped()
    data = x, torch.poisson((level + 0.5 * x + effect).exp())
    assert said_of(counts, data) == (None, "laplace")


def test_switches_have_one_mode():
    x, effect = grouped()
    data = x, torch.bernoulli((0.5 + x + effect).sigmoid())
    assert said_of(switches, data) == (None, "laplace")


@pytest.mark.slow
def test_a_population_holds_both_labelings():
    sampler = AnnealedSampler(marginalize(two_lines, ["effect"]), num_particles=400, seed=0)
    sampler.run(*on_two_lines())
    assert sampler.message.startswith("The Gaussian proposal of ['effect'], fitted at one place")
    share = float(sampler.mean((sampler.samples["slope"][:, 0] > 0.0).double()))
    assert abs(share - 0.5) < 0.15


@pytest.mark.slow
def test_jumps_lead_to_both_labelings():
    marginal = marginalize(two_lines, ["effect"])
    mcmc = MCMC(FlowNUTS(marginal, num_particles=400), 100, num_chains=8, seed=1)
    mcmc.run(*on_two_lines())
    first = (mcmc.get_samples(group_by_chain=True)["slope"][..., 0] > 0.0).double()
    assert any("particles come from the prior instead" in said for said in mcmc.messages)
    assert abs(float(first.mean()) - 0.5) < 0.15
    assert float((first[:, 1:] != first[:, :-1]).double().mean()) > 0.05
