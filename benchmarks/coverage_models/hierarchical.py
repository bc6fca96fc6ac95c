"""Partial pooling: schools, players, rats, pumps, districts, items."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.reparam import LocScaleReparam, TransformReparam

from benchmarks.coverage_models.data import (
    Collection,
    binary,
    counts,
    labels,
    members,
    normal,
    positive,
    uniform,
    values,
)

HIERARCHIES = Collection()
_SCHOOLS = {
    "y": values(28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0),
    "sigma": values(15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0),
}


@HIERARCHIES.case(**_SCHOOLS)
def eight_schools(y, sigma):
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), torch.ones(8)).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    tau = pyro.sample("tau", dist.HalfCauchy(25.0))
    pyro.sample("y", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


@HIERARCHIES.case(**_SCHOOLS)
def eight_schools_centred(y, sigma):
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, sigma), obs=y)


@HIERARCHIES.case(**_SCHOOLS)
def eight_schools_reparametrised(y, sigma):
    """Pyro's own handler makes the effects non-centred."""
    with poutine.reparam(config={"theta": LocScaleReparam(0.0)}):
        eight_schools_centred(y, sigma)


@HIERARCHIES.case(at_bats=values(*[45.0] * 18), hits=labels(18, of=20))
def baseball_pooled(at_bats, hits):
    phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
    with pyro.plate("player", len(hits)):
        pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits.to(phi))


@HIERARCHIES.case(at_bats=values(*[45.0] * 18), hits=labels(18, of=20))
def baseball_not_pooled(at_bats, hits):
    with pyro.plate("player", len(hits)):
        phi = pyro.sample("phi", dist.Uniform(0.0, 1.0))
        pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits.to(phi))


@HIERARCHIES.case(at_bats=values(*[45.0] * 18), hits=labels(18, of=20))
def baseball_partly_pooled(at_bats, hits):
    m = pyro.sample("m", dist.Uniform(0.0, 1.0))
    kappa = pyro.sample("kappa", dist.Pareto(1.0, 1.5))
    with pyro.plate("player", len(hits)):
        phi = pyro.sample("phi", dist.Beta(m * kappa, (1 - m) * kappa))
        pyro.sample("hits", dist.Binomial(at_bats, phi), obs=hits.to(phi))


@HIERARCHIES.case(at_bats=values(*[45.0] * 18), hits=labels(18, of=20))
def baseball_logits(at_bats, hits):
    loc = pyro.sample("loc", dist.Normal(-1.0, 1.0))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0))
    with pyro.plate("player", len(hits)):
        alpha = pyro.sample("alpha", dist.Normal(loc, scale))
        pyro.sample("hits", dist.Binomial(at_bats, logits=alpha), obs=hits.to(loc))


@HIERARCHIES.case(age=values(8.0, 15.0, 22.0, 29.0, 36.0), weight=normal(30, 5, loc=200.0))
def rats(age, weight):
    """Growth curves of thirty animals."""
    mean_a = pyro.sample("mean_a", dist.Normal(0.0, 100.0))
    mean_b = pyro.sample("mean_b", dist.Normal(0.0, 100.0))
    scale_a = pyro.sample("scale_a", dist.InverseGamma(0.5, 0.5)).sqrt()
    scale_b = pyro.sample("scale_b", dist.InverseGamma(0.5, 0.5)).sqrt()
    scale_y = pyro.sample("scale_y", dist.InverseGamma(0.5, 0.5)).sqrt()
    with pyro.plate("rat", len(weight), dim=-2):
        a = pyro.sample("a", dist.Normal(mean_a, scale_a))
        b = pyro.sample("b", dist.Normal(mean_b, scale_b))
        with pyro.plate("day", len(age), dim=-1):
            pyro.sample("weight", dist.Normal(a + b * (age - 22.0), scale_y), obs=weight)


@HIERARCHIES.case(time=positive(10), failures=counts(10))
def pumps(time, failures):
    alpha = pyro.sample("alpha", dist.Exponential(1.0))
    beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
    with pyro.plate("pump", len(time)):
        theta = pyro.sample("theta", dist.Gamma(alpha, beta))
        pyro.sample("failures", dist.Poisson(theta * time), obs=failures)


@HIERARCHIES.case(shocked=binary(12, 10))
def dogs(shocked):
    """Learning to avoid a shock, by the numbers of shocks and of avoidances so far."""
    a = pyro.sample("a", dist.HalfNormal(1.0))
    b = pyro.sample("b", dist.HalfNormal(1.0))
    shocks = shocked.cumsum(-1) - shocked
    avoided = (1 - shocked).cumsum(-1) - (1 - shocked)
    share = (-a * avoided - b * shocks).exp().clamp(1e-6, 1 - 1e-6)
    with pyro.plate("dog", len(shocked), dim=-2), pyro.plate("trial", shocked.shape[1], dim=-1):
        pyro.sample("shocked", dist.Bernoulli(share), obs=shocked)


@HIERARCHIES.case(subject=members(120, 20), x=normal(120), y=counts(120, rate=2.0))
def random_effects(subject, x, y):
    """A mixed model of counts, data in long format."""
    beta = pyro.sample("beta", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    with pyro.plate("subject", 20):
        u = pyro.sample("u", dist.Normal(0.0, scale))
    with pyro.plate("visit", len(y)):
        pyro.sample("y", dist.Poisson((beta[0] + beta[1] * x + u[subject]).exp()), obs=y)


@HIERARCHIES.case(person=members(200, 20), item=labels(200, of=10), correct=binary(200))
def item_response(person, item, correct):
    """Two parameters for each item, one for each person."""
    with pyro.plate("person", 20):
        ability = pyro.sample("ability", dist.Normal(0.0, 1.0))
    with pyro.plate("item", 10):
        difficulty = pyro.sample("difficulty", dist.Normal(0.0, 1.0))
        slope = pyro.sample("slope", dist.LogNormal(0.0, 0.5))
    logits = slope[item] * (ability[person] - difficulty[item])
    with pyro.plate("answer", len(correct)):
        pyro.sample("correct", dist.Bernoulli(logits=logits), obs=correct)


@HIERARCHIES.case(polls=normal(6, 3), votes=labels(6, 3, of=50))
def elections(polls, votes):
    """Correlated shares of the states, counted by polls of a hundred."""
    covariance = 0.1 * torch.eye(3) + 0.05
    alpha = pyro.sample("alpha", dist.MultivariateNormal(polls.mean(0), covariance))
    with pyro.plate("poll", len(polls)):
        rate = pyro.sample("rate", dist.Normal(alpha, 0.2).to_event(1))
        family = dist.Binomial(100.0, logits=rate).to_event(1)
        pyro.sample("votes", family, obs=votes.to(rate))


@HIERARCHIES.case(length=labels(40, of=12), remembered=binary(40))
def working_memory(length, remembered):
    """How long a sequence is remembered: a level and a slope."""
    theta = pyro.sample("theta", dist.Normal(7.0, 2.0))
    slope = pyro.sample("slope", dist.Normal(1.0, 0.3))
    with pyro.plate("trial", len(length)):
        pyro.sample("y", dist.Bernoulli(logits=slope * (theta - length)), obs=remembered)


@HIERARCHIES.case(county=members(60, 6), y=normal(60))
def reparametrised_scale(county, y):
    """A positive site, rewritten by Pyro as a transform of a plain one."""
    with poutine.reparam(config={"scale": TransformReparam()}):
        base = dist.Normal(0.0, 1.0)
        scale = pyro.sample(
            "scale", dist.TransformedDistribution(base, dist.transforms.ExpTransform())
        )
    with pyro.plate("county", 6):
        u = pyro.sample("u", dist.Normal(0.0, scale))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(u[county], 1.0), obs=y)


@HIERARCHIES.case(tau=uniform(4, low=0.1, high=0.5), slides=binary(9, 4))
def inclined_plane(tau, slides):
    """Friction from noisy measurements on a plane, a simulator of known physics."""
    mu = pyro.sample("mu", dist.Uniform(0.0, 0.8))
    gravity, height = 9.81, tau.sin() * 2.0
    speed = (2 * gravity * (tau.sin() - mu * tau.cos()).clamp(min=1e-3) / height).sqrt()
    with pyro.plate("run", len(slides), dim=-2), pyro.plate("angle", len(tau), dim=-1):
        pyro.sample("time", dist.Normal(1.0 / speed, 0.1), obs=slides)


@HIERARCHIES.case(district=members(30, 5), pupils=normal(30, 4))
def three_levels(district, pupils):
    """Pupils in schools in districts, levels by plates and by an index."""
    top = pyro.sample("top", dist.Normal(0.0, 5.0))
    scales = pyro.sample("scales", dist.HalfNormal(1.0).expand([3]).to_event(1))
    with pyro.plate("district", 5):
        by_district = pyro.sample("by_district", dist.Normal(top, scales[0]))
    with pyro.plate("school", len(pupils), dim=-2):
        mean = by_district[district][:, None]
        by_school = pyro.sample("by_school", dist.Normal(mean, scales[1]))
        with pyro.plate("pupil", pupils.shape[1], dim=-1):
            pyro.sample("y", dist.Normal(by_school, scales[2]), obs=pupils)


@HIERARCHIES.case(answer=labels(25, 4, of=3))
def dawid_skene(answer):
    """Raters of unknown skill; the true labels are summed out."""
    prevalence = pyro.sample("prevalence", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("rater", 4, dim=-1), pyro.plate("truth", 3, dim=-2):
        confusion = pyro.sample("confusion", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("item", len(answer), dim=-2):
        label = pyro.sample("label", dist.Categorical(prevalence))
        with pyro.plate("by", 4, dim=-1):
            likelihood = confusion[label, torch.arange(4)]
            pyro.sample("answer", dist.Categorical(likelihood), obs=answer)
