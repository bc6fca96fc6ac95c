"""Local posteriors of several modes: their estimates are unbiased, and chains find the truth."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.stats import effective_sample_size, split_gelman_rubin

import pyro_hamflow as phf
from pyro_hamflow.marginal import modes as modes_module
from pyro_hamflow.marginal.mending import fit_modes
from pyro_hamflow.marginal.proposals.mixture import MixtureParticle
from pyro_hamflow.marginal.scrutiny import look
from pyro_hamflow.model.kinds import Arguments
from tests.helpers.hard_terms import (
    HERE,
    PRIORS,
    TERMS,
    Y,
    data,
    effects_in_effects,
    effects_in_effects_exact,
    one_site,
    worst_score,
)
from tests.helpers.kinds import long_but

PILOT = {"mean": torch.tensor(0.0).double()}


def fitted(model, sites, y, num_particles=None, points="iid"):
    marginal = phf.marginalize(
        model, sites, num_particles=num_particles, proposal="laplace", points=points
    )
    fit_modes(marginal, PILOT, Arguments((y,)))
    return marginal


def estimates(marginal, y, replicates=20_000):
    """Log weights of many estimates at parameters that the proposal was not fitted at."""
    plan = marginal.plan(y)
    group = plan.structure.groups[0]
    noise = torch.randn(replicates, *plan.layouts[group.name].noise_shape(group))

    def one(u):
        return marginal.estimate(group, u, HERE, y).log_weights

    with torch.no_grad(), marginal.hold(plan.structure), pyro.validation_enabled(False):
        return torch.func.vmap(one, chunk_size=2000)(noise).flatten(2)


def far_places(x):
    weights = dist.Categorical(torch.tensor([0.5, 0.5]).expand(*x.shape, 2))
    return dist.MixtureSameFamily(weights, dist.Normal(torch.stack([x, x + 6.0], -1), 0.3))


def angle(x):
    return dist.VonMises(2.0 * x, 30.0)


SEVERAL = TERMS | {"angle": angle, "far places": far_places}


@pytest.mark.parametrize(
    ("term", "prior", "points"),
    long_but(
        lambda case: (
            list(SEVERAL).index(case[0]) % 2
            == list(PRIORS).index(case[1])
            == ["iid", "rqmc"].index(case[2])
        ),
        itertools.product(SEVERAL, PRIORS, ["iid", "rqmc"]),
    ),
)
def test_estimate_of_several_modes_is_unbiased(term, prior, points):
    term = SEVERAL[term]
    model, exact = one_site(PRIORS[prior], term)
    marginal = fitted(model, ["x"], data(term), 16, points)
    assert worst_score(estimates(marginal, data(term)), exact) < 4.0


@pytest.mark.parametrize("num_particles", [2, 4, 16])
def test_sites_inside_others_have_modes_together(num_particles):
    """Two effects of each subject, one of them for each visit; the data are far apart."""
    y = torch.tensor([[0.3, 1.2], [2.0, -3.0], [6.0, 0.5]], dtype=torch.float64)
    marginal = fitted(effects_in_effects, ["x", "w"], y, num_particles)
    assert worst_score(estimates(marginal, y), effects_in_effects_exact(y)) < 4.0


def _mistakes_the_tail(monkeypatch):
    """As if the noise were not stretched where it is."""
    draw = MixtureParticle.draw

    def spoilt(proposal, name, fn, noise, component):
        return draw(proposal, name, fn, 1.05 * noise, component)

    monkeypatch.setattr(MixtureParticle, "draw", spoilt)


def _forgets_the_shares(monkeypatch):
    """As if particles of each mode counted alike, whatever its share in the mixture."""
    mix = MixtureParticle.mix

    def spoilt(proposal, log_ratios):
        ratio, own = mix(proposal, log_ratios)
        return ratio, torch.full_like(own, -math.log(len(log_ratios)))

    monkeypatch.setattr(MixtureParticle, "mix", spoilt)


def _forgets_a_density(monkeypatch):
    """As if the mixture's density were that of its first mode."""
    mix = MixtureParticle.mix

    def spoilt(proposal, log_ratios):
        return log_ratios[0], mix(proposal, log_ratios)[1]

    monkeypatch.setattr(MixtureParticle, "mix", spoilt)


@pytest.mark.parametrize(
    "sabotage",
    long_but([_forgets_the_shares], [_mistakes_the_tail, _forgets_the_shares, _forgets_a_density]),
)
def test_sabotaged_mixtures_are_noticed(sabotage, monkeypatch):
    term = TERMS["square"]
    model, exact = one_site(PRIORS["normal"], term)
    marginal = fitted(model, ["x"], Y, 16)
    sabotage(monkeypatch)
    assert worst_score(estimates(marginal, Y, 100_000), exact, resolution=math.inf) > 8.0


def test_modes_are_found_each_once():
    """Of y ~ Normal(x**2, .3), two where y is positive, with the masses that quadrature tells."""
    y = torch.tensor([4.0, 2.25, -1.0], dtype=torch.float64)
    model, _ = one_site(PRIORS["normal"], TERMS["square"])
    marginal = phf.marginalize(model, ["x"], proposal="laplace")
    at = {"mean": torch.tensor(0.3).double()}
    fit_modes(marginal, at, Arguments((y,)))
    fit = marginal.proposal.fitted.sites["x", ()]
    assert len(fit.sites) == 2
    grid = torch.linspace(-4.0, 4.0, 8001)[:, None]
    joint = dist.Normal(0.3, 1.0).log_prob(grid) + dist.Normal(grid**2, 0.3).log_prob(y)
    right = (joint[4000:].logsumexp(0) - joint.logsumexp(0)).exp()
    even = modes_module._EVEN
    shares = fit.spread.log_shares.exp()
    wanted = (1 - even) * right + 0.5 * even
    assert torch.allclose(shares[0, :2], wanted[:2], atol=0.01)
    # The last has one mode, at zero, twice.
    assert torch.allclose(shares[:, 2], torch.tensor([0.5, 0.5]))
    assert torch.allclose(fit.mode[:, 0].abs(), y.clamp(min=0.0).sqrt(), atol=0.05)


def test_an_effect_with_one_mode_among_others_loses_no_particle():
    """Of a Gaussian model the estimate hardly varies, however many modes are sought."""
    y = torch.tensor([0.5, -1.0], dtype=torch.float64)
    model, exact = one_site(PRIORS["normal"], lambda x: dist.Normal(x, 0.5))
    marginal = fitted(model, ["x"], y, 16)
    found = look(marginal, HERE, Arguments((y,)), alone=True)
    assert found.variance(1) < 0.01
    exact = dist.Normal(HERE["mean"], math.sqrt(1.25)).log_prob(y)
    assert (found.log_likelihood - exact).abs().max() < 0.02


def test_gradient_of_the_estimate_is_its_slope():
    """Smooth in the parameters, with the noise held, over the modes of all elements."""
    model, _ = one_site(PRIORS["normal"], TERMS["square"])
    marginal = fitted(model, ["x"], Y, 8)
    plan = marginal.plan(Y)
    group = plan.structure.groups[0]
    noise = torch.randn(plan.layouts["x"].noise_shape(group))

    def value(mean):
        return marginal.estimate(group, noise, {"mean": mean}, Y).log_weights.logsumexp(0).sum()

    assert torch.autograd.gradcheck(value, torch.tensor(0.4, requires_grad=True))


def whole(term, scale):
    """A model of effects about an unknown mean, with that of the mean's posterior on a grid."""

    def model(y):
        mu = pyro.sample("mu", dist.Normal(0.0, 2.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", dist.Normal(mu, scale))
            pyro.sample("y", term(x), obs=y)

    def exact(y):
        means = torch.linspace(-7.0, 7.0, 351)
        grid = torch.linspace(-20.0, 20.0, 20_001)[:, None]
        terms = term(grid).log_prob(y)
        joint = [(dist.Normal(m, scale).log_prob(grid) + terms).logsumexp(0).sum() for m in means]
        weights = torch.softmax(torch.stack(joint) + dist.Normal(0.0, 2.0).log_prob(means), 0)
        return torch.stack([(weights * means).sum(), (weights * means.abs()).sum()])

    return model, exact


WHOLE = {
    "square": (lambda x: dist.Normal(x**2, 0.3), 1.0, 0.5),
    "angle": (lambda x: dist.VonMises(x, 50.0), 3.0, 1.0),
    "far places": (far_places, 2.0, -2.0),
    "conflict": (lambda x: dist.StudentT(2.0, x, 0.1), 1.0, 0.3),
}


@pytest.mark.slow
@pytest.mark.parametrize(("term", "scale", "mean"), WHOLE.values(), ids=WHOLE)
def test_chains_by_all_defaults_find_the_posterior(term, scale, mean):
    model, exact = whole(term, scale)
    torch.manual_seed(3)
    y = term(mean + scale * torch.randn(20)).sample()
    if term is WHOLE["conflict"][0]:
        y[:3] += torch.tensor([6.0, -5.0, 8.0])
    marginal = phf.marginalize(model, ["x"])
    kernel = phf.PseudoMarginalNUTS(marginal)
    mcmc = phf.MCMC(kernel, 500, 500, num_chains=4, seed=0, disable_progbar=True)
    mcmc.run(y)
    assert "several modes of each are fitted instead" in " ".join(mcmc.messages)
    assert kernel.settings["log_likelihood_variance"] < 1.0
    mu = mcmc.get_samples(group_by_chain=True)["mu"]
    for found, right in zip((mu, mu.abs()), exact(y), strict=True):
        count = float(effective_sample_size(found))
        assert count > 400.0 and float(split_gelman_rubin(found)) < 1.02
        assert (found.mean() - right).abs() < 4.0 * found.std() / math.sqrt(count)
