"""Priors that are no Gaussians, in coordinates in which they are: sites of their likelihoods."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

import pyro_hamflow as phf
from pyro_hamflow.marginal import joint_density
from pyro_hamflow.marginal.gamma_quantile import gamma_score
from pyro_hamflow.marginal.normal_transform import normal_transform
from pyro_hamflow.marginal.proposals import laplace
from pyro_hamflow.marginal.scores import _score, reference, score_form
from tests.helpers.kinds import long_but
from tests.mixed_models import MIXED_MODELS

GRID = torch.linspace(-40.0, 40.0, 40_001, dtype=torch.float64)  # unconstrained
COUNTS = torch.tensor([0.0, 1.0, 4.0, 9.0], dtype=torch.float64)
REAL = torch.tensor([-2.0, 0.3, 1.1, 4.0], dtype=torch.float64)


def poisson(x):
    return dist.Poisson(1.5 * x)


def normal(x):
    return dist.Normal(x, 0.5)


def binomial(x):
    return dist.Binomial(12, x)


def gammas(a, b):
    parts = dist.Gamma(torch.stack([a, 4.0 * a]), torch.stack([b, b]))
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7]).to(a)), parts)


# A prior by two positive parameters, a likelihood and its data.
FAMILIES = {
    "gamma": (dist.Gamma, poisson, COUNTS),
    "exponential": (lambda a, b: dist.Exponential(b / a), poisson, COUNTS),
    "half-normal": (lambda a, b: dist.HalfNormal(b / a), poisson, COUNTS),
    "inverse gamma": (lambda a, b: dist.InverseGamma(a + 1.0, b), poisson, COUNTS),
    "weibull": (lambda a, b: dist.Weibull(b, a), poisson, COUNTS),
    "half-cauchy": (lambda a, b: dist.HalfCauchy(b / a), poisson, COUNTS),
    "beta": (dist.Beta, binomial, COUNTS),
    "uniform": (lambda a, b: dist.Uniform(-a, 5.0 * b), normal, REAL),
    "laplace": (dist.Laplace, normal, REAL),
    "gumbel": (dist.Gumbel, normal, REAL),
    "student t": (lambda a, b: dist.StudentT(3.0, a, b), normal, REAL),
    "degrees of freedom": (lambda a, b: dist.StudentT(2.0 * a, 0.0, b), normal, REAL),
    "mixture of gammas": (gammas, poisson, COUNTS),
}


NOT_IN_PLACE = ("beta", "student t", "degrees of freedom")  # their coordinates move with scales


def at(a, b):
    return {"a": torch.tensor(a).double(), "b": torch.tensor(b).double()}


HERE, THERE = at(1.5, 1.2), at(1.9, 1.0)


def model_of(family):
    prior, term, _ = family

    def model(y):
        a = pyro.sample("a", dist.LogNormal(0.0, 1.0))
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            x = pyro.sample("x", prior(a, b))
            pyro.sample("y", term(x), obs=y)

    return model


def exact(family, values):
    """The log likelihood of each datum, by quadrature over the unconstrained line."""
    prior, term, y = family
    fn = prior(values["a"], values["b"])
    support = getattr(fn, "component_distribution", fn).support
    transform = biject_to(support)
    x = transform(GRID)
    inside = support.check(x) & (x > 1e-300 if fn.support is not None and term is poisson else True)
    joint = fn.log_prob(x) + transform.log_abs_det_jacobian(GRID, x)
    joint = (joint + term(x).log_prob(y[:, None])).where(inside, torch.tensor(-torch.inf))
    return joint.nan_to_num(-torch.inf).logsumexp(1) + math.log(GRID[1] - GRID[0])


def estimates(family, values, num_particles, proposal="laplace", replicates=4000):
    """Log estimates of each datum, ``(replicates, data)``; of sites fitted at ``HERE``."""
    y = family[2]
    marginal = phf.marginalize(
        model_of(family), ["x"], num_particles=num_particles, proposal=proposal
    )
    if proposal == "laplace":
        marginal.fit(y, pilot=HERE)
    plan = marginal.plan(y)
    group = plan.structure.groups[0]
    shape = plan.layouts[group.name].noise_shape(group)

    def one(u):
        return marginal.estimate(group, u, values, y).log_weights.logsumexp(0)

    noise = torch.randn(replicates, *shape, dtype=torch.float64)
    with torch.no_grad(), marginal.hold(plan.structure), pyro.validation_enabled(False):
        return torch.func.vmap(one, chunk_size=1000)(noise)


@pytest.mark.parametrize(
    ("name", "num_particles"),
    long_but(
        lambda case: (list(FAMILIES).index(case[0]) % 2 == 0) == (case[1] == 8),
        itertools.product(FAMILIES, [2, 8]),
    ),
)
def test_estimate_is_unbiased_where_it_was_not_fitted(name, num_particles):
    family = FAMILIES[name]
    ratio = (estimates(family, THERE, num_particles) - exact(family, THERE)).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert error.max() < 0.1, "the test has no power"
    assert bool(((ratio.mean(0) - 1.0).abs() < 4.0 * error).all())


def test_a_coordinate_that_moves_otherwise_is_noticed(monkeypatch):
    """As if the prior's mean in the held coordinate were not that of the score."""
    honest = laplace.gaussian_form

    def wrong(name, fn, component=None, near=None):
        form = honest(name, fn, component, near)
        return form._replace(loc=form.loc + 0.3) if near is not None else form

    monkeypatch.setattr(laplace, "gaussian_form", wrong)
    family = FAMILIES["gamma"]
    ratio = (estimates(family, THERE, 8) - exact(family, THERE)).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert ((ratio.mean(0) - 1.0).abs() / error).max() > 8.0


@pytest.mark.parametrize(
    "name", long_but(["gamma", "uniform", "laplace", "student t", "mixture of gammas"], FAMILIES)
)
def test_few_particles_do_where_many_of_the_prior_would_not(name):
    """Eight vary less than four times as many of the prior, fitted where they are used or not."""
    family = FAMILIES[name]
    for values in (HERE, THERE):
        own = estimates(family, values, 8, replicates=1000).var(0).sum()
        assert own < 0.5 * estimates(family, values, 32, "prior", 1000).var(0).sum()


def test_estimates_do_for_degrees_of_freedom_far_from_the_fit():
    """As a normal and a chi-squared number they varied fifteen times as much."""
    family = FAMILIES["degrees of freedom"]
    for degrees in (1.0, 100.0):
        values = at(0.5 * degrees, 1.2)
        found = estimates(family, values, 8, replicates=1000)
        assert found.var(0).sum() < 0.5
        ratio = (found - exact(family, values)).exp()
        assert (ratio.mean(0) - 1.0).abs().max() < 4.5 * (ratio.std(0) / 1000**0.5).max()


@pytest.mark.parametrize("name", ["gamma", "weibull", "laplace"])
def test_held_coordinates_keep_the_likelihood_in_its_place(name, monkeypatch):
    """Where the prior moves, normal scores alone would take the site along."""
    family = FAMILIES[name]
    far = at(1.5, 2.4)
    held = estimates(family, far, 8).var(0).sum()
    monkeypatch.setattr(joint_density, "reference_of", lambda fn, value, component: None)
    assert held < 0.5 * estimates(family, far, 8).var(0).sum()


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NOT_IN_PLACE])
def test_reference_is_the_inverse_of_the_draw(name):
    prior = FAMILIES[name][0]
    fn = getattr(prior(HERE["a"], HERE["b"]), "component_distribution", None)
    fn = prior(HERE["a"], HERE["b"]) if fn is None else fn
    z = torch.tensor([-3.0, -0.4, 0.2, 1.7, 4.0], dtype=torch.float64)[:, None]
    z = z.expand(5, *fn.batch_shape) if fn.batch_shape else z[:, 0]
    z = z.clone().requires_grad_()
    x = normal_transform(fn).draw(z)
    (slope,) = torch.autograd.grad(x.sum(), z)
    found = reference(fn, x.detach())
    rising = slope.sign()  # an inverse gamma's draws fall with the noise
    assert torch.allclose(found.score, z.detach(), atol=1e-7)
    assert torch.allclose(found.log_slope, -(rising * slope).log(), atol=1e-6)


@pytest.mark.parametrize("name", ["gamma", "inverse gamma", "weibull", "uniform", "laplace"])
def test_coordinate_does_not_move_at_its_reference(name):
    """Neither does its slope, and both forms give the same value there."""
    prior = FAMILIES[name][0]
    held = reference(prior(HERE["a"], HERE["b"]), torch.tensor(1.7).double())
    here = score_form(prior(HERE["a"], HERE["b"]), HERE["a"], held)
    there = score_form(prior(THERE["a"], THERE["b"]), HERE["a"], held)
    v = held.score.reshape(1)
    slopes = []
    for form in (here, there):
        assert torch.allclose(form.value(v), held.value, rtol=1e-9)
        slopes.append(torch.autograd.functional.jacobian(form.value, v))
    assert torch.allclose(*slopes, rtol=1e-7)


DEEP = {
    "half-normal": (dist.HalfNormal, lambda t: math.log(2.0) + torch.special.log_ndtr(-t)),
    "exponential": (lambda scale: dist.Exponential(1.0 / scale), lambda t: -t),
    "laplace": (lambda scale: dist.Laplace(0.0, scale), lambda t: -t - math.log(2.0)),
    "weibull": (lambda scale: dist.Weibull(scale, 2.0), lambda t: -t.square()),
    "gamma": (lambda scale: dist.Gamma(2.0, 1.0 / scale), lambda t: t.log1p() - t),
}


@pytest.mark.parametrize("name", DEEP)
def test_scores_are_right_at_any_depth(name):
    prior, log_tail = DEEP[name]
    t = torch.tensor([2.0, 30.0, 200.0, 1e3], dtype=torch.float64)
    scale = torch.tensor(0.01, dtype=torch.float64)

    def score(x, scale):
        return reference(prior(scale), x).score

    found = score(scale * t, scale)
    assert torch.allclose(torch.special.log_ndtr(-found), log_tail(t), rtol=1e-5)
    slope = (score(scale * t * (1 + 1e-6), scale) - found) / (scale * t * 1e-6)
    assert torch.allclose(reference(prior(scale), scale * t).log_slope, slope.log(), atol=1e-4)


@pytest.mark.parametrize("name", DEEP)
def test_scores_have_two_derivatives(name):
    """In the value and the scale: sites of several are fitted by Newton's method in both."""

    def score(x, scale):
        return _score(DEEP[name][0](scale))(x)

    for t in (0.2, 1.3, 6.0):
        at_t = torch.tensor([[t], [0.7]], dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(score, tuple(at_t))
        assert torch.autograd.gradgradcheck(score, tuple(at_t))


def test_scores_far_out_follow_the_shape_of_a_gamma():
    x = torch.tensor([1e-250, 1.0, 900.0, 1e4], dtype=torch.float64)
    shape = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda a: gamma_score(a, x), shape)
    change = gamma_score(shape + 1e-5, x) - gamma_score(shape - 1e-5, x)
    assert torch.allclose(jacobian, change.detach() / 2e-5, rtol=1e-2)


def test_a_prior_may_be_far_narrower_than_where_sites_were_fitted():
    """As of a scale that may be zero: where the mode was lies tens of them out."""
    far, family = at(30.0, 1.2), (FAMILIES["half-normal"][0], normal, REAL[1:])
    log_ratio = estimates(family, far, 4) - exact(family, far)
    error = log_ratio.exp().std(0) / math.sqrt(len(log_ratio))
    assert log_ratio.var(0).max() < 0.05
    assert bool(((log_ratio.exp().mean(0) - 1.0).abs() < 4.0 * error + 1e-6).all())


def test_parameters_of_vectors_and_of_outer_sites_are_followed():
    """A vector of gammas, and a rate below a normal site: each element's exact likelihood."""

    def model(y):
        b = pyro.sample("b", dist.LogNormal(0.0, 1.0))
        with pyro.plate("group", len(y)):
            u = pyro.sample("u", dist.Normal(0.0, 0.5))
            prior = dist.Gamma(2.0 * b.new_ones(2), (u.exp() * b)[..., None])
            x = pyro.sample("x", prior.to_event(1))
            pyro.sample("y", dist.Poisson(x).to_event(1), obs=y)

    y = torch.tensor([[0.0, 1.0], [4.0, 2.0], [9.0, 7.0]], dtype=torch.float64)
    marginal = phf.marginalize(model, ["u", "x"], num_particles=8)
    marginal.fit(y, pilot={"b": torch.tensor(1.2, dtype=torch.float64)})
    assert marginal.proposal.name == "laplace"
    plan = marginal.plan(y)
    group = plan.structure.groups[0]
    noise = torch.randn(4000, *plan.layouts[group.name].noise_shape(group), dtype=torch.float64)

    def one(u):
        return marginal.estimate(group, u, {"b": THERE["b"]}, y).log_weights.logsumexp(0)

    with torch.no_grad(), marginal.hold(plan.structure), pyro.validation_enabled(False):
        found = torch.func.vmap(one, chunk_size=1000)(noise)
    u = torch.linspace(-4.0, 4.0, 2001, dtype=torch.float64)
    counts = dist.GammaPoisson(2.0, (u.exp() * THERE["b"])[:, None, None]).log_prob(y).sum(-1)
    joint = counts + dist.Normal(0.0, 0.5).log_prob(u)[:, None]
    ratio = (found - (joint.logsumexp(0) + math.log(u[1] - u[0]))).exp()
    error = ratio.std(0) / math.sqrt(len(ratio))
    assert error.max() < 0.1, "the test has no power"
    assert bool(((ratio.mean(0) - 1.0).abs() < 4.0 * error).all())


def test_pumps_take_two_particles_by_default():
    """Of the prior, 32 have a variance of 1.5, and two of thousands."""
    case = MIXED_MODELS["pumps"]
    marginal = phf.marginalize(case.model, list(case.sites))
    pilot = marginal.pilot(case.arguments(), {})
    assert marginal.proposal.name == "laplace"
    found = phf.estimator_quality(marginal, pilot, *case.arguments())
    assert found.num_particles == 2
    assert found.standard_deviation < 0.5
