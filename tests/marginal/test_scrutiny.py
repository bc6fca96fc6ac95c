"""What a proposal misses is noticed, and the estimator is tuned where the posterior is."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal import pilot as pilot_module
from pyro_hamflow.marginal import preparation as preparation_module
from pyro_hamflow.marginal import scrutiny as scrutiny_module
from pyro_hamflow.marginal.mending import fewer_particles, more_particles
from pyro_hamflow.marginal.proposals import mixture as mixture_module
from pyro_hamflow.marginal.scrutiny import Look, look, missed, misses
from pyro_hamflow.marginal.settle import repeated_estimates
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.kinds import long_but

GRID = torch.linspace(-12.0, 12.0, 24_001, dtype=torch.float64)
Y = torch.tensor([0.8, 1.5, 0.3, 2.0, 1.1, 0.2, 0.9, 1.7], dtype=torch.float64)


def effects(term):
    """A model of one effect for each datum, and the log likelihood of each by quadrature."""

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", dist.Normal(mean, 1.0))
            pyro.sample("y", term(x), obs=y)

    def exact(mean, y):
        joint = dist.Normal(mean, 1.0).log_prob(GRID) + term(GRID).log_prob(y[:, None])
        return joint.logsumexp(1) + math.log(GRID[1] - GRID[0])

    return model, exact


def two_places(x):
    weights = dist.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64))
    return dist.MixtureSameFamily(weights, dist.Normal(torch.stack([x, x + 2.0], -1), 0.3))


SEVERAL_MODES = {
    "square": lambda x: dist.Normal(x**2, 0.3),
    "absolute": lambda x: dist.Normal(x.abs(), 0.3),
    "two places": two_places,
    "circle": lambda x: dist.VonMises(4.0 * x, 5.0),
}


@pytest.mark.parametrize("name", long_but(["square", "two places"], SEVERAL_MODES))
def test_missed_modes_are_noticed_and_mended(name, monkeypatch):
    model, exact = effects(SEVERAL_MODES[name])
    named = phf.marginalize(model, ["x"], proposal="laplace")
    pilot = named.pilot((Y,), {})
    assert named.proposal.name == "laplace" and "take `proposal='prior'`" in named.prepared.remark
    lost = exact(pilot["mean"], Y) - look(named, pilot, Arguments((Y,)), alone=True).log_likelihood
    assert lost.max() > 0.2

    chosen = phf.marginalize(model, ["x"])
    pilot = chosen.pilot((Y,), {})
    assert (
        chosen.proposal.name == "laplace"
        and "several modes of each are fitted" in chosen.prepared.remark
    )
    prior = look(chosen, pilot, Arguments((Y,)), from_prior=True)
    monkeypatch.setattr(scrutiny_module, "_POINTS", 4096)
    found = look(chosen, pilot, Arguments((Y,)))
    assert (found.log_likelihood - exact(pilot["mean"], Y)).abs().max() < 0.03
    assert found.variance(1) < 0.1 * prior.variance(1)


@pytest.mark.parametrize("term", SEVERAL_MODES.values(), ids=SEVERAL_MODES)
def test_particles_come_from_the_prior_where_modes_are_still_missed(term, monkeypatch):
    monkeypatch.setattr(mixture_module, "MOST_MODES", 1)
    model, exact = effects(term)
    chosen = phf.marginalize(model, ["x"])
    pilot = chosen.pilot((Y,), {})
    assert (
        chosen.proposal.name == "prior"
        and "particles come from the prior instead" in chosen.prepared.remark
    )
    found = look(chosen, pilot, Arguments((Y,)), from_prior=True)
    gap = found.log_likelihood - exact(pilot["mean"], Y)
    assert bool((gap.abs() < 4.5 * found.error).all())
    assert found.error.max() < 0.2


def test_nothing_is_missed_where_there_is_one_mode():
    model, _ = effects(lambda x: dist.Poisson(x.exp()))
    marginal = phf.marginalize(model, ["x"])
    pilot = marginal.pilot((Y.round(),), {})
    assert marginal.proposal.name == "laplace" and marginal.prepared.remark is None
    assert misses(marginal, [pilot], Arguments((Y.round(),))) is None


@pytest.mark.parametrize("level", [0.0, 2.0, 5.0])
def test_pareto_k_is_small_where_the_estimate_hardly_varies(level):
    model, _ = effects(lambda x: dist.Poisson((level + x).exp()))
    y = dist.Poisson((level + torch.randn(40)).exp()).sample()
    marginal = phf.marginalize(model, ["x"], proposal="laplace")
    marginal.fit(y, pilot={"mean": torch.tensor(0.0)})
    found = look(marginal, {"mean": torch.tensor(0.1)}, Arguments((y,)))
    assert found.variance(1) < 3.0
    assert found.max_pareto_k < 0.7


def test_pareto_k_is_no_more_than_zero_where_weights_are_nearly_equal():
    """Their shape is that of a Pareto distribution with k = 1.5, and says nothing."""
    tail = torch.rand(128, 12, dtype=torch.float64) ** -1.5
    for scale, least, most in ((1e-6, -math.inf, 0.0), (1.0, 0.9, 2.0)):
        log_weights = torch.log1p(scale * tail)
        found = Look(torch.zeros(12), torch.ones(12), log_weights)
        assert least <= found.max_pareto_k <= most


@pytest.mark.parametrize("term", ["square", "absolute"])
def test_pareto_k_is_large_where_a_proposal_fits_badly(term):
    model, _ = effects(SEVERAL_MODES[term])
    y = Y.repeat(5)
    marginal = phf.marginalize(model, ["x"], proposal="laplace")
    marginal.fit(y, pilot={"mean": torch.tensor(0.3)})
    found = look(marginal, {"mean": torch.tensor(0.3)}, Arguments((y,)))
    assert found.variance(1) > 10.0
    assert found.max_pareto_k > 1.0


def test_only_what_exceeds_its_error_is_missed():
    weights = torch.zeros(4, 3)
    default = look_of([0.0, 0.0, 0.0], [0.01, 0.01, 0.01], weights)
    prior = look_of([0.3, 0.3, 0.05], [0.02, 0.2, 0.001], weights)
    assert missed(default, prior).tolist() == [0]


def look_of(values, errors, weights):
    return Look(torch.tensor(values), torch.tensor(errors), weights)


def seizures(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    s = pyro.sample("s", dist.HalfCauchy(1.0))
    with pyro.plate("subject", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, s))
        pyro.sample("y", dist.Poisson((beta[0] + beta[1] * x + u).exp()), obs=y)


@pytest.mark.slow
def test_warm_up_tunes_an_estimator_that_was_fitted_far_away(monkeypatch):
    x = torch.linspace(-1.0, 1.0, 40)
    y = dist.Poisson((3.0 + x + 0.6 * torch.randn(40)).exp()).sample()
    far = {"beta": torch.tensor([-2.0, -1.0]), "s": torch.tensor(0.6)}
    monkeypatch.setattr(
        preparation_module, "find_pilot", lambda *args, **kwargs: pilot_module.Pilot(far, 50.0)
    )

    def run():
        marginal = phf.marginalize(seizures, ["u"])
        kernel = phf.PseudoMarginalNUTS(marginal)
        mcmc = phf.MCMC(kernel, 50, 200, num_chains=4, seed=0, disable_progbar=True)
        mcmc.run(x, y)
        centre = {name: value.mean(0) for name, value in mcmc.get_samples().items()}
        noise = phf.estimator_quality(marginal, centre, x, y).standard_deviation
        return mcmc, marginal, noise

    mcmc, marginal, noise = run()
    assert (
        marginal.proposal.fitted.anchor.values["beta"] - torch.tensor([3.0, 1.0])
    ).abs().max() < 0.6
    assert noise < 1.0
    assert "did not come to rest" in " ".join(mcmc.messages)
    assert math.isfinite(mcmc.kernel.settings["max_pareto_k"])
    first = mcmc.get_samples()["beta"]
    mcmc.run(x, y)  # from the estimator that the pilot left, not from the tuned one
    assert torch.equal(mcmc.get_samples()["beta"], first)
    monkeypatch.setattr(EstimatorTuning, "retuned", lambda tuning, state, may_move: None)
    assert run()[2] > 1.5 * noise


def test_warm_up_takes_more_particles_of_the_prior_where_they_are_too_few():
    x = torch.linspace(-1.0, 1.0, 40)
    y = dist.Poisson((3.0 + x + 0.6 * torch.randn(40)).exp()).sample()
    marginal = phf.marginalize(seizures, ["u"], proposal="prior")
    kernel = phf.PseudoMarginalNUTS(marginal, max_tree_depth=3)
    mcmc = phf.MCMC(kernel, 10, 120, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(x, y)
    assert marginal.settled_particles > 32
    here = {"beta": torch.tensor([3.0, 1.0]).double(), "s": torch.tensor(0.6).double()}
    few = phf.marginalize(seizures, ["u"], proposal="prior")
    more = more_particles(few, [here], Arguments((x, y)))
    variances = [look(each, here, Arguments((x, y))).variance(1) for each in (few, more)]
    assert variances[0] / 32 > 4.0
    assert variances[1] / more.settled_particles <= 4.0 or more.settled_particles == 512
    given = phf.marginalize(seizures, ["u"], num_particles=32, proposal="prior")
    assert more_particles(given, [here], Arguments((x, y))) is None


def test_warm_up_takes_fewer_particles_where_they_are_more_than_enough():
    """What it wanted while chains were far away is not kept where they arrive."""
    x = torch.linspace(-1.0, 1.0, 40).double()
    y = dist.Poisson((3.0 + x + 0.6 * torch.randn(40)).exp()).sample()
    marginal = phf.marginalize(seizures, ["u"])
    here = marginal.pilot((x, y), {})
    marginal.settle(16)
    fewer = fewer_particles(marginal, [here], Arguments((x, y)))
    assert fewer.settled_particles <= 4
    assert repeated_estimates(fewer, here, 400, Arguments((x, y))).sum(-1).var() <= 1.0
    assert fewer_particles(fewer, [here], Arguments((x, y))) is None
    given = phf.marginalize(seizures, ["u"], num_particles=16)
    given.pilot((x, y), {})
    assert fewer_particles(given, [here], Arguments((x, y))) is None
