"""A proposal that is none of the package's own: a class, in a file of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize
from pyro_hamflow.marginal.proposals.base import Draw, Proposal
from tests.helpers.estimates import AT, assert_unbiased, estimates, parameters

Y = torch.tensor([0.3, 2.0, -1.0], dtype=torch.float64)


class WideParticle:
    """A particle of a Gaussian prior that is drawn from a wider one."""

    def __init__(self, times):
        self.times = times

    def draw(self, name, fn, noise, component):
        source = dist.Normal(fn.loc, self.times * fn.scale)
        value = source.loc + source.scale * noise
        return Draw(value, (fn.log_prob(value) - source.log_prob(value),))

    def mix(self, log_ratios):
        return log_ratios[0], None


@dataclass(frozen=True)
class WideProposal(Proposal):
    times: float = 2.0
    name = "wide"

    def noise_shapes(self, plan, group, trace, splits):
        return dict.fromkeys(splits, torch.Size())

    def particle(self, plan, group, stratum, coordinates, parameters, source):
        return WideParticle(self.times)


def normal_means(y):
    mu, s = parameters()
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def test_estimate_by_a_proposal_of_ones_own_is_unbiased(monkeypatch):
    marginal = marginalize(normal_means, ["x"], num_particles=8, proposal=WideProposal())
    exact = dist.Normal(AT["mu"], (AT["s"] ** 2 + 1.0).sqrt()).log_prob(Y)
    assert_unbiased(estimates(marginal, AT, Y)["x"], exact)
    assert "proposal='wide'" in repr(marginal)
    monkeypatch.setattr(WideParticle, "mix", lambda particle, ratios: (0.0 * ratios[0], None))
    with pytest.raises(AssertionError):
        assert_unbiased(estimates(marginal, AT, Y)["x"], exact, resolution=math.inf)


@dataclass(frozen=True)
class FittedProposal(WideProposal):
    times: float | None = None  # until it is fitted
    needs_fit = True

    def fit(self, plan, pilot):
        return replace(self, times=1.0 + float(pilot["s"]))


def test_a_proposal_of_ones_own_is_fitted_at_the_pilot_and_kept():
    marginal = marginalize(normal_means, ["x"], num_particles=8, proposal=FittedProposal())
    kernel = PseudoMarginalNUTS(marginal)
    MCMC(kernel, num_samples=5, warmup_steps=40, num_chains=2, seed=0, disable_progbar=True).run(Y)
    assert isinstance(marginal.proposal, FittedProposal)
    assert marginal.proposal.times == 1.0 + float(marginal.pilot((Y,), {})["s"])
    far = 3.0 * Y
    marginal.prepare((far,), {})
    assert marginal.proposal.times == 1.0 + float(marginal.pilot((far,), {})["s"])


@pytest.mark.parametrize(
    ("prior", "name"), [(dist.Gamma(2.0, 1.0), "laplace"), (dist.VonMises(0.0, 2.0), None)]
)
def test_auto_asks_priors_for_a_gaussian_form(prior, name):
    def model(y):
        with pyro.plate("row", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    marginal = marginalize(model, ["x"])
    assert "proposal='auto'" in repr(marginal)
    with pytest.raises(RuntimeError, match="not chosen yet"):
        _ = marginal.proposal
    if name is None:
        with pytest.raises(ValueError, match="the prior of local site 'x' does not serve"):
            marginal.plan(Y)
    else:
        marginal.plan(Y)
        assert marginal.proposal.name == name
