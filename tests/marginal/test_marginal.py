"""Likelihood estimates: unbiased, differentiable, and right in every arrangement of plates."""

from __future__ import annotations

import itertools
import math
import warnings
from functools import partial

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.optim import Adam
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_hamflow import marginalize, noise
from pyro_hamflow.marginal import plan as plan_module
from pyro_hamflow.marginal.likelihood_site import LikelihoodSite
from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.proposals.user import ProgramParticle
from pyro_hamflow.model.potential import Potential
from tests.helpers.estimates import AT, REPLICATES, assert_unbiased, estimates, parameters
from tests.helpers.kinds import long_but
from tests.helpers.targets import glmm, glmm_data, wide_proposal


def gaussian(y, loc, covariance):
    """Log density of each row of y."""
    loc = torch.as_tensor(loc).expand(covariance.shape[-1])
    return dist.MultivariateNormal(loc, covariance).log_prob(y)


# --- two models with known marginals ------------------------------------------------------------

Y = torch.tensor([[0.3, 1.2], [-1.0, 0.4], [2.2, 0.9]], dtype=torch.float64)
ANSWERS = torch.tensor([[1.0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1]], dtype=torch.float64)


def normal_normal(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x, 0.9), obs=y)


def normal_logit(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x), obs=y)


def normal_normal_marginal(y):
    return gaussian(y, AT["mu"], 0.81 * torch.eye(y.shape[1]) + AT["s"] ** 2)


def normal_logit_marginal(y):
    x = torch.linspace(-9.0, 9.0, 4001)[:, None]
    log_joint = dist.Normal(AT["mu"], AT["s"]).log_prob(x)
    log_joint = log_joint + dist.Bernoulli(logits=x[..., None]).log_prob(y).sum(-1)
    return log_joint.logsumexp(0) + math.log(18.0 / 4000)


def around(parameters, y):
    """A proposal of one's own, which depends on the parameters and on the data."""
    with pyro.plate("subject", len(y), dim=-2):
        middle = 0.5 * (parameters["mu"] + y.mean(-1, keepdim=True))
        pyro.sample("x", dist.Normal(middle, 1.3))


MODELS = {
    "gaussian": (normal_normal, Y, normal_normal_marginal),
    "logit": (normal_logit, ANSWERS, normal_logit_marginal),
}
PROPOSALS = {"prior": "prior", "laplace": "laplace", "function": around}


@pytest.mark.parametrize(
    ("name", "proposal", "num_particles", "points"),
    long_but(
        lambda case: case[2] == {"iid": 1, "antithetic": 4, "rqmc": 32}[case[3]],
        itertools.product(MODELS, PROPOSALS, [1, 4, 32], ["iid", "antithetic", "rqmc"]),
    ),
)
def test_unbiased_estimate(name, proposal, num_particles, points):
    (model, y, exact), proposal = MODELS[name], PROPOSALS[proposal]
    marginal = marginalize(
        model, ["x"], num_particles=num_particles, proposal=proposal, points=points
    )
    if proposal == "laplace":  # fitted elsewhere than it is used
        marginal.fit(y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    assert_unbiased(estimates(marginal, AT, y)["x"], exact(y))


def _spread_where_the_prior_is_wide(monkeypatch=None):
    """Fitted under a narrow prior, for subjects whose likelihood is no Gaussian."""
    marginal = marginalize(normal_logit, ["x"], num_particles=16, proposal="laplace")
    answers = torch.tensor([[0.0] * 6, [1.0] * 6], dtype=torch.float64)
    pilot, wide = (
        {"mu": torch.tensor(3.0).double(), "s": torch.tensor(s).double()} for s in (0.5, 2.0)
    )
    marginal.fit(answers, pilot=pilot)
    if monkeypatch:
        monkeypatch.setattr(LikelihoodSite, "towards", lambda site, *_: site)
    return estimates(marginal, wide, answers)["x"].std(0)


def test_proposal_suits_a_prior_wider_than_the_pilots(monkeypatch):
    mended, plain = _spread_where_the_prior_is_wide(), _spread_where_the_prior_is_wide(monkeypatch)
    assert mended.max() < 0.25, mended
    assert plain.max() > 2.0 * mended.max(), plain


@pytest.mark.parametrize("width", [1e-3, 0.3, 1.0, 3.0, 1e3])
def test_site_passes_from_one_prior_to_the_other(width):
    """Between two sites, at each end close to the one that was fitted there."""

    def fitted(width, value):
        matrix, vector = torch.full((1, 2, 2), value), torch.full((1, 2), value)
        return LikelihoodSite(torch.tensor([-2.0 * math.log(width)]), matrix, vector, None)

    narrow, wide = fitted(0.3, 0.0), fitted(0.3 * math.sqrt(32.0), 1.0)
    site = narrow.towards(wide, torch.eye(2).expand(1, 2, 2) / width**2)
    share = torch.sigmoid(torch.tensor(5.0 * (2.0 * math.log(width / 0.3) / math.log(32.0) - 0.5)))
    assert torch.allclose(site.precision, share.expand(1, 2, 2), atol=1e-5)
    assert torch.allclose(site.linear, share.expand(1, 2), atol=1e-5)


def _forgets_to_divide(monkeypatch):
    monkeypatch.setattr(Layout, "log_factors", property(lambda layout: torch.zeros(1)))


def _forgets_the_ratio(monkeypatch):
    draw = ProgramParticle.draw
    forget = lambda *args: draw(*args)._replace(log_ratios=())  # noqa: E731
    monkeypatch.setattr(ProgramParticle, "draw", forget)


def _forgets_a_visit(monkeypatch):
    density = plan_module.log_density
    part = torch.tensor([1.0, 0.97])
    monkeypatch.setattr(plan_module, "log_density", lambda site: part * density(site))


@pytest.mark.parametrize("sabotage", [_forgets_to_divide, _forgets_the_ratio, _forgets_a_visit])
def test_sabotaged_estimate_is_noticed(sabotage, monkeypatch):
    marginal = marginalize(normal_normal, ["x"], num_particles=4, proposal=around)
    exact = normal_normal_marginal(Y)
    assert_unbiased(estimates(marginal, AT, Y)["x"], exact)
    with monkeypatch.context() as patch:
        sabotage(patch)
        log_estimates = estimates(marginal, AT, Y)["x"]
    with pytest.raises(AssertionError):
        assert_unbiased(log_estimates, exact)


# --- arrangements of sites and plates -----------------------------------------------------------


def two_sites(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mu, s))
        w = pyro.sample("w", dist.Normal(0.5 * x, 0.7))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x + w, 0.9), obs=y)


def two_sites_marginal(y):
    variance = 1.5**2 * AT["s"] ** 2 + 0.49
    return gaussian(y, 1.5 * AT["mu"], 0.81 * torch.eye(2) + variance)


def nested_sites(y, subject=-2):
    mu, s = parameters()
    visit = -3 - subject
    with pyro.plate("subject", len(y), dim=subject):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=visit):
            w = pyro.sample("w", dist.Normal(0.3 * x, 0.6))
            pyro.sample("y", dist.Normal(x + w, 0.9), obs=y if subject == -2 else y.mT)


def nested_sites_marginal(y):
    variance = 1.3**2 * AT["s"] ** 2
    return gaussian(y, 1.3 * AT["mu"], (0.81 + 0.36) * torch.eye(2) + variance)


def swapped_plates(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-1):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-2):
            pyro.sample("y", dist.Normal(x, 0.9), obs=y.mT)


def two_plates_around(y):
    """One local site in both plates: each cell is an element."""
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-2), pyro.plate("visit", y.shape[1], dim=-1):
        x = pyro.sample("x", dist.Normal(mu, s))
        pyro.sample("y", dist.Normal(x, 0.9), obs=y)


def two_plates_around_marginal(y):
    return dist.Normal(AT["mu"], (AT["s"] ** 2 + 0.81).sqrt()).log_prob(y)


TIMES = torch.arange(3.0, dtype=torch.float64)


def path(y):
    """A latent path in no plate, one joint estimate."""
    mu, s = parameters()
    covariance = s**2 * torch.exp(-(TIMES[:, None] - TIMES).abs())
    x = pyro.sample("x", dist.MultivariateNormal(mu.expand(3), covariance))
    pyro.sample("y", dist.Normal(x, 0.9).to_event(1), obs=y[:, 0])


def path_marginal(y):
    covariance = AT["s"] ** 2 * torch.exp(-(TIMES[:, None] - TIMES).abs())
    return gaussian(y[:, 0], AT["mu"], covariance + 0.81 * torch.eye(3))


def vector_site(y):
    mu, s = parameters()
    root = torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.MultivariateNormal(mu.expand(2), scale_tril=s * root))
        pyro.sample("y", dist.Normal(x, 0.9).to_event(1), obs=y)


def vector_site_marginal(y):
    root = AT["s"] * torch.tensor([[1.0, 0.0], [0.6, 0.5]])
    return gaussian(y, AT["mu"], root @ root.mT + 0.81 * torch.eye(2))


WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
LOCS = torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)


def mixture_prior(y):
    mu, s = parameters()
    prior = dist.MixtureSameFamily(dist.Categorical(WEIGHTS), dist.Normal(mu + LOCS, s))
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", prior)
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x, 0.9), obs=y)


def mixture_prior_marginal(y):
    parts = [gaussian(y, AT["mu"] + loc, 0.81 * torch.eye(2) + AT["s"] ** 2) for loc in LOCS]
    return (torch.stack(parts, -1) + WEIGHTS.log()).logsumexp(-1)


def vector_mixture(y, independent=False):
    mu, s = parameters()
    loc = (mu + LOCS)[:, None].expand(3, 2)
    if independent:
        parts = dist.Normal(loc, s).to_event(1)
    else:
        parts = dist.MultivariateNormal(loc, s**2 * torch.eye(2))
    with pyro.plate("subject", len(y)):
        x = pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(WEIGHTS), parts))
        pyro.sample("y", dist.Normal(x, 0.9).to_event(1), obs=y)


def vector_mixture_marginal(y):
    scale = (AT["s"] ** 2 + 0.81).sqrt()
    parts = [dist.Normal(AT["mu"] + loc, scale).log_prob(y).sum(-1) for loc in LOCS]
    return (torch.stack(parts, -1) + WEIGHTS.log()).logsumexp(-1)


def weighted(y):
    """Answers that count half, and one that is missing."""
    mu, s = parameters()
    seen = torch.ones(y.shape, dtype=torch.bool)
    seen[0, 1] = False
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-1), poutine.scale(scale=0.5):
            pyro.sample("y", dist.Normal(x, 0.9).mask(seen), obs=y)


def weighted_marginal(y):
    x = torch.linspace(-9.0, 9.0, 4001)[:, None]
    terms = 0.5 * dist.Normal(x[..., None], 0.9).log_prob(y)
    terms[:, 0, 1] = 0.0
    log_joint = dist.Normal(AT["mu"], AT["s"]).log_prob(x) + terms.sum(-1)
    return log_joint.logsumexp(0) + math.log(18.0 / 4000)


def weighted_prior(y):
    """The whole plate, prior included, counts 0.8 times."""
    with poutine.scale(scale=0.8):
        mu, s = 0.4, 0.8
        with pyro.plate("subject", len(y), dim=-2):
            x = pyro.sample("x", dist.Normal(mu, s))
            with pyro.plate("visit", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(x, 0.9), obs=y)


def weighted_prior_marginal(y):
    x = torch.linspace(-9.0, 9.0, 4001)[:, None]
    log_joint = dist.Normal(0.4, 0.8).log_prob(x)
    log_joint = log_joint + dist.Normal(x[..., None], 0.9).log_prob(y).sum(-1)
    return (0.8 * log_joint).logsumexp(0) + math.log(18.0 / 4000)


def missing_subject(y):
    """A subject that is masked as a whole contributes nothing."""
    mu, s = parameters()
    present = torch.tensor([[True], [False], [True]])
    with pyro.plate("subject", len(y), dim=-2), poutine.mask(mask=present):
        x = pyro.sample("x", dist.Normal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x, 0.9), obs=y)


def missing_subject_marginal(y):
    return normal_normal_marginal(y) * torch.tensor([1.0, 0.0, 1.0])


def log_normal_prior(y):
    mu, s = parameters()
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.LogNormal(mu, s))
        with pyro.plate("visit", y.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(x.log(), 0.9), obs=y)


ARRANGEMENTS = {
    "two sites": (two_sites, ["x", "w"], two_sites_marginal),
    "two sites in other order": (two_sites, ["w", "x"], two_sites_marginal),
    "nested sites": (nested_sites, ["x", "w"], nested_sites_marginal),
    "nested sites, plates swapped": (
        partial(nested_sites, subject=-1),
        ["x", "w"],
        nested_sites_marginal,
    ),
    "plates swapped": (swapped_plates, ["x"], normal_normal_marginal),
    "site in both plates": (two_plates_around, ["x"], two_plates_around_marginal),
    "no plate": (path, ["x"], path_marginal),
    "vector": (vector_site, ["x"], vector_site_marginal),
    "mixture": (mixture_prior, ["x"], mixture_prior_marginal),
    "vector mixture": (vector_mixture, ["x"], vector_mixture_marginal),
    "independent vector mixture": (
        partial(vector_mixture, independent=True),
        ["x"],
        vector_mixture_marginal,
    ),
    "scale and mask": (weighted, ["x"], weighted_marginal),
    "scaled prior": (weighted_prior, ["x"], weighted_prior_marginal),
    "masked prior": (missing_subject, ["x"], missing_subject_marginal),
    "log-normal prior": (log_normal_prior, ["x"], normal_normal_marginal),
}


@pytest.mark.parametrize(
    ("name", "proposal", "points"),
    long_but(
        lambda case: case[1:] in (("prior", "rqmc"), ("laplace", "iid")),
        itertools.product(ARRANGEMENTS, ["prior", "laplace"], ["iid", "rqmc"]),
    ),
)
def test_unbiased_arrangement(name, proposal, points):
    model, sites, exact = ARRANGEMENTS[name]
    marginal = marginalize(model, sites, num_particles=8, proposal=proposal, points=points)
    if proposal == "laplace":
        marginal.fit(Y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    (log_estimates,) = estimates(marginal, AT, Y).values()
    assert_unbiased(log_estimates, exact(Y))


def exact_posterior(parameters, y):
    """The posterior of the sites of `two_sites`, the second given the first."""
    mu, variance = parameters["mu"], parameters["s"] ** 2
    mean = y.mean(-1, keepdim=True)
    precision = 1 / variance + 1.5**2 / (0.49 + 0.405)
    middle = (mu / variance + 1.5 * mean / (0.49 + 0.405)) / precision
    with pyro.plate("subject", len(y), dim=-2):
        x = pyro.sample("x", dist.Normal(middle, precision.rsqrt()))
        precision = torch.tensor(1 / 0.49 + 1 / 0.405)
        middle = (0.5 * x / 0.49 + (mean - x) / 0.405) / precision
        pyro.sample("w", dist.Normal(middle, precision.rsqrt()))


@pytest.mark.parametrize("points", ["iid", "rqmc"])
def test_estimate_from_the_exact_posterior_is_exact(points):
    """A proposal may draw one site given another; the best has no variance at all."""
    marginal = marginalize(
        two_sites, ["x", "w"], num_particles=3, proposal=exact_posterior, points=points
    )
    log_estimates = estimates(marginal, AT, Y, replicates=10)["x_w"]
    exact = two_sites_marginal(Y).expand(10, 3)
    assert torch.allclose(log_estimates, exact, rtol=1e-10)


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_unbiased_groups_in_unrelated_plates(proposal):
    def model(y):
        mu, s = parameters()
        with pyro.plate("a", 3):
            x = pyro.sample("x", dist.Normal(mu, s))
            pyro.sample("y", dist.Normal(x, 0.9), obs=y[:, 0])
        with pyro.plate("b", 2):
            w = pyro.sample("w", dist.Normal(-mu, s))
            pyro.sample("z", dist.Normal(w, 0.5), obs=y[:2, 1])

    marginal = marginalize(model, ["x", "w"], num_particles=8, proposal=proposal)
    if proposal == "laplace":
        marginal.fit(Y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    log_estimates = estimates(marginal, AT, Y, replicates=4 * REPLICATES)
    mu, s = AT["mu"], AT["s"]
    assert_unbiased(log_estimates["x"], dist.Normal(mu, (s**2 + 0.81).sqrt()).log_prob(Y[:, 0]))
    assert_unbiased(log_estimates["w"], dist.Normal(-mu, (s**2 + 0.25).sqrt()).log_prob(Y[:2, 1]))


@pytest.mark.parametrize("points", ["iid", "antithetic", "rqmc"])
def test_unbiased_gamma_prior(points):
    """Gamma-Poisson: the marginal is negative binomial."""
    counts = torch.tensor([0.0, 2.0, 5.0])

    def model(y):
        shape = pyro.sample("shape", dist.LogNormal(0.0, 1.0))
        with pyro.plate("subject", len(y)):
            rate = pyro.sample("rate", dist.Gamma(shape, 0.7))
            pyro.sample("y", dist.Poisson(rate), obs=y)

    marginal = marginalize(model, ["rate"], num_particles=8, points=points)
    log_estimates = estimates(marginal, {"shape": torch.tensor(1.4)}, counts)["rate"]
    exact = dist.GammaPoisson(1.4, 0.7).log_prob(counts)
    assert_unbiased(log_estimates, exact)


def _values(potential, position, noise):
    with torch.no_grad(), pyro.validation_enabled(False):
        graph = make_fx(lambda *point: potential.value_of_one(*point))(position[0], noise[0])
        return torch.func.vmap(graph)(position, noise)


def test_unbiased_sites_below_an_enumerated_one():
    def model(y):
        mu, s = parameters()
        with pyro.plate("subject", len(y), dim=-2):
            kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
            x = pyro.sample("x", dist.Normal(mu + LOCS[kind], s))
            with pyro.plate("visit", y.shape[1], dim=-1):
                w = pyro.sample("w", dist.Normal(0.3 * x, 0.6))
                pyro.sample("y", dist.Normal(x + w, 0.9), obs=y)

    marginal = marginalize(model, ["x", "w"], num_particles=16, proposal="laplace")
    marginal.fit(Y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    potential = Potential(marginal, (Y,), separate_noise=True)
    noise = torch.randn(2000, potential.noise_dimension)
    position = potential.flatten(AT).expand(2000, -1)
    values = _values(potential, position, noise)
    prior = dist.Normal(0.0, 2.0).log_prob(AT["mu"])
    prior = prior + dist.Normal(0.0, 1.0).log_prob(AT["s"].log())
    covariance = 1.17 * torch.eye(2) + 1.69 * AT["s"] ** 2
    parts = [gaussian(Y, 1.3 * (AT["mu"] + loc), covariance) for loc in LOCS]
    exact = (torch.stack(parts, -1) + WEIGHTS.log()).logsumexp(-1).sum()
    assert_unbiased((-values - prior)[:, None], exact[None])


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_enumerated_site_is_summed_exactly(proposal):
    def model(y):
        mu, s = parameters()
        with pyro.plate("subject", len(y)):
            kind = pyro.sample("kind", dist.Categorical(WEIGHTS))
            x = pyro.sample("x", dist.Normal(mu + LOCS[kind], s))
            pyro.sample("y", dist.Normal(x, 0.9), obs=y)

    y = Y[:, 0].contiguous()
    marginal = marginalize(model, ["x"], num_particles=16, proposal=proposal)
    if proposal == "laplace":
        marginal.fit(y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    potential = Potential(marginal, (y,), separate_noise=True)
    assert [site.name for site in potential.sites] == ["mu", "s"]
    noise = torch.randn(1000, potential.noise_dimension)
    values = _values(potential, potential.flatten(AT).expand(1000, -1), noise)
    prior = dist.Normal(0.0, 2.0).log_prob(AT["mu"]) + dist.Normal(0.0, 1.0).log_prob(AT["s"].log())
    if proposal == "prior":  # by hand: the particles of every kind come from the same noise
        u = noise.reshape(1000, 16, 3, 1)
        x = AT["mu"] + LOCS + AT["s"] * u
        terms = dist.Normal(x, 0.9).log_prob(y[:, None]).logsumexp(1) - math.log(16)
        by_hand = (terms + WEIGHTS.log()).logsumexp(-1).sum(-1)
        assert torch.allclose(-values - prior, by_hand, rtol=1e-11)
    scale = (AT["s"] ** 2 + 0.81).sqrt()
    parts = dist.Normal(AT["mu"] + LOCS, scale).log_prob(y[:, None]) + WEIGHTS.log()
    assert_unbiased((-values - prior)[:, None], parts.logsumexp(-1).sum()[None])


def test_deterministic_site_and_return_value_survive():
    def model(y):
        mu, s = parameters()
        pyro.deterministic("double", 2 * mu)
        with pyro.plate("subject", len(y)):
            x = pyro.sample("x", dist.Normal(mu, s))
            pyro.deterministic("square", x**2)
            pyro.sample("y", dist.Normal(x, 0.9), obs=y)
        return mu + s

    marginal = marginalize(model, ["x"], num_particles=2)
    trace = poutine.trace(poutine.condition(marginal, AT)).get_trace(Y[:, 0])
    assert trace.nodes["_RETURN"]["value"] == AT["mu"] + AT["s"]
    assert trace.nodes["double"]["value"] == 2 * AT["mu"]
    assert "square" not in trace.nodes
    assert "x" not in trace.nodes
    assert trace.nodes["x_log_likelihood"]["fn"].batch_shape == (3,)


# --- gradients ----------------------------------------------------------------------------------


def _glmm_gradients(z, y, beta, mu, log_precision, logit_weight, u):
    """The paper's hand-derived log estimate and gradients, misprints mended; x = 3 u."""
    precision = log_precision.exp()
    x = 3.0 * u  # (subjects, particles)
    weights = torch.stack([torch.sigmoid(logit_weight), torch.sigmoid(-logit_weight)])
    gap = x[..., None] - mu
    parts = weights.log() + 0.5 * (log_precision - math.log(2 * math.pi) - precision * gap**2)
    log_f = parts.logsumexp(-1)
    share = (parts - log_f[..., None]).exp()
    eta = x[..., None] + (z @ beta)[:, None, :]
    answers = y[:, None, :]
    log_g = -torch.where(answers > 0.5, (-eta).exp(), eta.exp()).log1p().sum(-1)
    log_q = -0.5 * u**2 - 0.5 * math.log(2 * math.pi) - math.log(3.0)
    log_omega = log_g + log_f - log_q
    log_p = log_omega.logsumexp(1) - math.log(u.shape[1])
    w = (log_omega - log_omega.logsumexp(1, keepdim=True)).exp()
    residual = answers - torch.sigmoid(eta)
    f_mu = precision * gap * share
    f_log_precision = (0.5 - 0.5 * precision * gap**2) * share
    f_logit = share[..., 0] * weights[1] - share[..., 1] * weights[0]
    g_u = 3.0 * residual.sum(-1)
    f_u = -3.0 * f_mu.sum(-1)
    return (
        log_p.sum(),
        torch.einsum("tn,tnj,tjp->p", w, residual, z),
        (w[..., None] * f_mu).sum((0, 1)),
        (w[..., None] * f_log_precision).sum((0, 1)),
        (w * f_logit).sum(),
        w * (f_u + g_u + u),
    )


def test_gradients_agree_with_paper():
    z, y = glmm_data(40)
    marginal = marginalize(glmm, ["x"], num_particles=16, proposal=wide_proposal)
    potential = Potential(marginal, (z, y), separate_noise=True)
    position = (0.5 * torch.randn(potential.dimension)).requires_grad_()
    noise = torch.randn(potential.noise_dimension).requires_grad_()
    value = potential.value_of_one(position, noise)
    slope, noise_slope = torch.autograd.grad(value, (position, noise))
    at = potential.constrain(position.detach())
    u = noise.detach().reshape(16, 40).mT
    log_p, *slopes, u_slope = _glmm_gradients(z, y, **at, u=u)
    scale = {"beta": 10.0, "mu": 10.0, "log_precision": 3.0, "logit_weight": 3.0}
    log_prior = sum(dist.Normal(0.0, scale[k]).log_prob(at[k]).sum() for k in at)
    assert torch.allclose(-value, log_p + log_prior, rtol=1e-9, atol=1e-9)
    by_hand = [s - at[k] / scale[k] ** 2 for k, s in zip(scale, slopes, strict=True)]
    assert list(at) == list(scale)
    by_hand = torch.cat([part.reshape(-1) for part in by_hand])
    assert torch.allclose(-slope, by_hand, rtol=1e-9, atol=1e-9)
    assert torch.allclose(-noise_slope.reshape(16, 40).mT, u_slope, rtol=1e-9, atol=1e-9)


GRADIENTS = {
    "gaussian, laplace": (normal_normal, ["x"], "laplace"),
    "function": (normal_normal, ["x"], around),
    "nested, laplace": (nested_sites, ["x", "w"], "laplace"),
    "mixture": (mixture_prior, ["x"], "prior"),
    "mixture, laplace": (mixture_prior, ["x"], "laplace"),
    "path": (path, ["x"], "laplace"),
}


@pytest.mark.parametrize("points", ["iid", "rqmc"])
@pytest.mark.parametrize("model, sites, proposal", GRADIENTS.values(), ids=GRADIENTS)
def test_gradients_agree_with_finite_differences(model, sites, proposal, points):
    marginal = marginalize(model, sites, num_particles=4, proposal=proposal, points=points)
    if proposal == "laplace":
        marginal.fit(Y, pilot={"mu": torch.tensor(0.0), "s": torch.tensor(1.2)})
    potential = Potential(marginal, (Y,), separate_noise=True)
    position, u = potential.flatten(AT), torch.randn(potential.noise_dimension)
    point = [position.requires_grad_(), u.requires_grad_()]
    slopes = torch.autograd.grad(potential.value_of_one(*point), point)
    step = 1e-5
    for which, slope in enumerate(slopes):
        differences = []
        for unit in torch.eye(len(slope)):
            ends = []
            for sign in (step, -step):
                point = [position.detach(), u.detach()]
                point[which] = point[which] + sign * unit
                with torch.no_grad():
                    ends.append(potential.value_of_one(*point))
            differences.append((ends[0] - ends[1]) / (2 * step))
        assert torch.allclose(slope, torch.stack(differences), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "model, sites, proposal",
    [(nested_sites, ["x", "w"], "laplace"), (mixture_prior, ["x"], "prior")],
    ids=["nested", "mixture"],
)
def test_captured_estimate_agrees_with_model(model, sites, proposal):
    marginal = marginalize(model, sites, num_particles=4, proposal=proposal, points="rqmc")
    marginal.fit(Y, pilot=AT)
    potential = Potential(marginal, (Y,), separate_noise=True)
    graph = potential.programs.base("gradients")
    assert potential.programs.fallback_reason is None
    position, u = torch.randn(potential.dimension), torch.randn(potential.noise_dimension)
    point = [position.requires_grad_(), u.requires_grad_()]
    value = potential.value_of_one(*point)
    plain = value.detach(), *torch.autograd.grad(value, point)
    captured = graph(position.detach(), u.detach())
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(captured, plain, strict=True))


# --- how much estimates vary --------------------------------------------------------------------


def test_variance_of_the_glmm_estimate_is_ordered():
    z, y = glmm_data()
    at = {
        "beta": torch.tensor([0.2, -0.5, 1.0, 0.1, 0.4, -0.3, 0.8, 0.0]),
        "mu": torch.tensor([0.0, 3.0]),
        "log_precision": torch.tensor([10.0, 3.0]).log(),
        "logit_weight": torch.tensor(1.4),
    }

    def variance(num_particles, proposal, points):
        marginal = marginalize(
            glmm, ["x"], num_particles=num_particles, proposal=proposal, points=points
        )
        marginal.fit(z, y, pilot=at)
        log_estimates = estimates(marginal, at, z, y, replicates=100)["x"]
        return log_estimates.sum(-1).var().item()

    assert variance(8, "laplace", "iid") < 0.5
    prior, lattice = variance(16, "prior", "iid"), variance(16, "prior", "rqmc")
    assert lattice < 0.5 * prior
    assert 2 * prior < variance(16, wide_proposal, "iid")


# --- noise, and what comes back -----------------------------------------------------------------


def test_noise_written_by_hand_gives_the_same_estimate():
    def by_hand(y):
        mu, s = parameters()
        x = mu + s * noise("u", (8, len(y), 1))
        terms = dist.Normal(x[..., None], 0.9).log_prob(y[:, None]).sum(-1)
        pyro.factor("estimate", (terms.logsumexp(0) - math.log(8)).sum())

    marginal = marginalize(normal_normal, ["x"], num_particles=8, proposal="prior")
    results = []
    point = [torch.randn(2).requires_grad_(), torch.randn(24).requires_grad_()]
    for written in (by_hand, marginal):
        value = Potential(written, (Y,), separate_noise=True).value_of_one(*point)
        results.append([value, *torch.autograd.grad(value, point)])
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(*results, strict=True))


def test_noise_is_a_standard_normal_site():
    with poutine.trace() as tracer:
        value = noise("u", (3, 2), dtype=torch.float32)
    site = tracer.trace.nodes["u"]
    assert value.shape == (3, 2) and value.dtype == torch.float32
    assert site["infer"]["noise"] and site["fn"].event_shape == (3, 2)
    expected = dist.Normal(0.0, 1.0).log_prob(value).sum()
    assert torch.allclose(site["fn"].log_prob(value), expected.float())


@pytest.mark.parametrize("model, points", [(two_sites, "iid"), (nested_sites, "rqmc")])
def test_picked_particles_follow_the_posterior(model, points):
    """Weighted by their estimate, picked particles are draws of x given the data."""
    marginal = marginalize(model, ["x", "w"], num_particles=8, points=points)
    potential = Potential(marginal, (Y,), separate_noise=True)
    position = potential.flatten(AT).expand(20000, -1)
    result = potential.evaluate(position, potential.draw_noise(20000))
    log_estimates = result.log_likelihoods["x_w"]
    assert log_estimates.shape == (20000, 3)
    weight = (log_estimates - log_estimates.logsumexp(0)).exp()
    variance = AT["s"] ** 2
    slope, extra = (1.5, 0.49) if model is two_sites else (1.3, 0.36)
    joint = 0.81 * torch.eye(2) + slope**2 * variance
    joint = joint + (extra if model is two_sites else extra * torch.eye(2))
    gain = torch.linalg.solve(joint, slope * variance * torch.ones(2))
    mean = AT["mu"] + (Y - slope * AT["mu"]) @ gain
    spread = variance - slope * variance * gain.sum()
    x = result.local["x"].reshape(20000, 3)
    assert result.local["w"].shape == ((20000, 3, 1) if model is two_sites else (20000, 3, 2))
    for moment, expected in ((x, mean), ((x - mean) ** 2, spread)):
        error = (weight * (moment - expected)).square().sum(0).sqrt()
        assert bool((error < 0.03).all())
        assert bool((((weight * moment).sum(0) - expected).abs() < 4 * error).all())
    total = dist.Normal(0.0, 2.0).log_prob(AT["mu"]) + dist.Normal(0.0, 1.0).log_prob(AT["s"].log())
    assert torch.allclose(-result.value, log_estimates.sum(-1) + total, rtol=1e-12)


# --- algorithms of Pyro -------------------------------------------------------------------------


@pytest.mark.parametrize("proposal", ["prior", "laplace"])
def test_stock_algorithms_run(proposal):
    marginal = marginalize(normal_normal, ["x"], num_particles=4, proposal=proposal)
    marginal.fit(Y, pilot=AT)
    mcmc = MCMC(
        NUTS(marginal, max_tree_depth=2), num_samples=3, warmup_steps=3, disable_progbar=True
    )
    mcmc.run(Y)
    samples = mcmc.get_samples()
    assert samples["x_noise"].shape == (3, 4, 3, 1)
    assert samples["mu"].shape == (3,)
    pyro.clear_param_store()
    guide = AutoNormal(marginal)
    svi = SVI(marginal, guide, Adam({"lr": 0.01}), Trace_ELBO())
    assert all(math.isfinite(svi.step(Y)) for _ in range(3))
    predicted = Predictive(marginal, guide=guide, num_samples=4, parallel=False)(Y)
    assert predicted["x_noise"].reshape(4, 4, 3, 1).std() > 0.1
    again = Predictive(marginal, posterior_samples=samples, parallel=False)(Y)
    assert again["x_log_likelihood"].shape[0] == 3


def test_laplace_fits_by_itself_and_again_for_other_data():
    marginal = marginalize(normal_normal, ["x"], num_particles=4, proposal="laplace")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        poutine.trace(marginal).get_trace(Y)
    first = marginal.pilot((Y,), {})
    assert first.keys() == {"mu", "s"}
    assert marginal.pilot((Y.clone(),), {}) is first
    assert not torch.equal(marginal.pilot((Y + 3.0,), {})["mu"], first["mu"])


@pytest.mark.parametrize(
    "prior",
    [dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), dist.Gamma(2.0, 1.0)],
    ids=["normal", "log-normal", "gamma"],
)
def test_gaussian_sites_are_chosen_for_every_transform_of_noise(prior):
    def model(y):
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", prior)
            pyro.sample("y", dist.Normal(x, 1.0), obs=y)

    marginal = marginalize(model, ["x"])
    plan = marginal.plan(torch.tensor([0.3, 1.2]))
    assert marginal.proposal.name == "laplace"
    assert plan.layouts["x"].num_particles == 16
