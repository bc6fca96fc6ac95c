"""Time: loops over steps, paths, filters, differential equations by small steps."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.reparam import (
    LinearHMMReparam,
    StableReparam,
    StudentTReparam,
    SymmetricStableReparam,
)
from pyro.ops.tensor_utils import periodic_repeat
from pyro.poutine import reparam

from benchmarks.coverage_models.data import Collection, counts, normal, positive

SERIES = Collection()


@SERIES.case(y=normal(60))
def stochastic_volatility(y):
    """A random walk of the log scale of returns with heavy tails."""
    sigma = pyro.sample("sigma", dist.Exponential(50.0))
    nu = pyro.sample("nu", dist.Exponential(0.1))
    with pyro.plate("steps", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    path = pyro.deterministic("path", sigma * z.cumsum(-1))
    with pyro.plate("returns", len(y)):
        pyro.sample("y", dist.StudentT(nu, 0.0, path.exp()), obs=y)


@SERIES.case(y=normal(50))
def autoregressive(y):
    """Five lags, in one product."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([5]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    lags = y.unfold(0, 5, 1)[:-1]
    pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma).to_event(1), obs=y[5:])


@SERIES.case(y=normal(25))
def arma(y):
    """The errors follow from each other, one step after the other."""
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0))
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    theta = pyro.sample("theta", dist.Normal(0.0, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    error = y[0] - mu - phi * mu
    errors = [error]
    for t in range(1, len(y)):
        error = y[t] - (mu + phi * y[t - 1] + theta * error)
        errors.append(error)
    pyro.sample("error", dist.Normal(torch.stack(errors), sigma).to_event(1), obs=torch.zeros(25))


@SERIES.case(y=normal(25))
def arma_of_residuals(y):
    """The same as a factor of the log density."""
    mu, phi, theta = pyro.sample("coefficients", dist.Normal(0.0, 2.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    mean = mu
    for t, value in enumerate(y):
        pyro.factor(f"step_{t}", dist.Normal(mean, sigma).log_prob(value))
        mean = mu + phi * value + theta * (value - mean)


@SERIES.case(y=normal(30))
def garch(y):
    """The variance of a step follows from the step before, written in place."""
    mu = pyro.sample("mu", dist.Normal(0.0, 1.0))
    alpha = pyro.sample("alpha", dist.Dirichlet(torch.ones(3)))
    level = pyro.sample("level", dist.HalfNormal(1.0))
    variance = torch.empty(len(y))
    variance[0] = level
    for t in range(1, len(y)):
        variance[t] = (
            level + alpha[0] * (y[t - 1] - mu).square() + alpha[1] * variance[t - 1].clone()
        )
    with pyro.plate("time", len(y)):
        pyro.sample("y", dist.Normal(mu, variance.sqrt()), obs=y)


@SERIES.case(pelts=positive(20, 2))
def lotka_volterra(pelts):
    """Lynx and hare by small Euler steps on the log scale."""
    alpha, beta, gamma, delta = pyro.sample(
        "rates", dist.LogNormal(-1.0, 0.5).expand([4]).to_event(1)
    )
    sigma = pyro.sample("sigma", dist.LogNormal(-1.0, 1.0))
    state = pyro.sample("start", dist.LogNormal(0.0, 1.0).expand([2]).to_event(1)).log()
    path = []
    for _ in range(len(pelts)):
        for _ in range(4):
            prey, hunter = state.exp()
            state = state + 0.05 * torch.stack([alpha - beta * hunter, delta * prey - gamma])
        path.append(state)
    pyro.sample("pelts", dist.LogNormal(torch.stack(path), sigma).to_event(2), obs=pelts)


@SERIES.case(cases=counts(20))
def epidemic(cases):
    """An SIR model without process noise, reported with a fixed share."""
    r0 = pyro.sample("r0", dist.LogNormal(0.5, 0.5))
    recovery = pyro.sample("recovery", dist.Beta(3.0, 5.0))
    rho = pyro.sample("rho", dist.Beta(2.0, 4.0))
    size = pyro.sample("size", dist.Exponential(0.2))
    s, i, population = 990.0, 10.0, 1000.0
    expected = []
    for _ in range(len(cases)):
        infections = s * (1 - (-r0 * recovery * i / population).exp())
        s, i = s - infections, i + infections - recovery * i
        expected.append(rho * infections)
    mean = torch.stack(expected).clamp(min=1e-4)
    family = dist.NegativeBinomial(size, logits=(mean / size).log()).to_event(1)
    pyro.sample("cases", family, obs=cases)


@SERIES.case(y=normal(30))
def local_level(y):
    """A path sampled step by step, each a site of its own."""
    drift = pyro.sample("drift", dist.HalfNormal(0.5))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    level = 0.0
    for t in pyro.markov(range(len(y))):
        level = pyro.sample(f"level_{t}", dist.Normal(level, drift))
        pyro.sample(f"y_{t}", dist.Normal(level, noise), obs=y[t])


@SERIES.case(y=normal(24, 1), season=normal(24))
def forecast(y, season):
    """A trend, a weekly pattern and a random walk, as in a forecasting model."""
    bias = pyro.sample("bias", dist.Normal(0.0, 10.0))
    weight = pyro.sample("weight", dist.Normal(0.0, 0.1))
    drift_scale = pyro.sample("drift_scale", dist.LogNormal(-5.0, 5.0))
    week = pyro.sample("week", dist.Normal(0.0, 5.0).expand([7]).to_event(1))
    with pyro.plate("time", len(y), dim=-1):
        drift = pyro.sample("drift", dist.Normal(0.0, 1.0))
    motion = (drift_scale * drift).cumsum(-1)
    mean = bias + weight * season + motion + periodic_repeat(week, len(y), dim=-1)
    scale = pyro.sample("scale", dist.LogNormal(-5.0, 5.0))
    with pyro.plate("observed", len(y), dim=-1):
        pyro.sample("residual", dist.Normal(mean, scale), obs=y[:, 0])


@SERIES.case(y=normal(15, 2))
def gaussian_hmm(y):
    """A linear state-space model, the states integrated out by a filter."""
    drift = pyro.sample("drift", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    noise = pyro.sample("noise", dist.LogNormal(-1.0, 1.0).expand([2]).to_event(1))
    hmm = dist.GaussianHMM(
        dist.Normal(torch.zeros(2), 1.0).to_event(1),
        0.9 * torch.eye(2),
        dist.Normal(torch.zeros(2), drift).to_event(1),
        torch.eye(2),
        dist.Normal(torch.zeros(2), noise).to_event(1),
        duration=len(y),
    )
    pyro.sample("y", hmm, obs=y)


@SERIES.case(y=normal(15, 1))
def heavy_tailed_hmm(y):
    """A linear state-space model with noise of Student's type, made normal by auxiliary sites."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    hmm = dist.LinearHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 0.3).to_event(1),
        torch.eye(1),
        dist.StudentT(4.0, torch.zeros(1), scale).to_event(1),
        duration=len(y),
    )
    with reparam(config={"y": LinearHMMReparam(obs=StudentTReparam())}):
        pyro.sample("y", hmm, obs=y)


@SERIES.case(y=normal(40))
def stable(y):
    """Log returns of a stable distribution without a density, by auxiliary sites."""
    stability = pyro.sample("stability", dist.Uniform(1.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with reparam(config={"y": SymmetricStableReparam()}):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Stable(stability, 0.0, scale), obs=y)


@SERIES.case(y=normal(20))
def skewed_stable(y):
    stability = pyro.sample("stability", dist.Uniform(1.1, 1.9))
    skew = pyro.sample("skew", dist.Uniform(-1.0, 1.0))
    with reparam(config={"y": StableReparam()}):
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Stable(stability, skew, 1.0), obs=y)


@SERIES.case(y=normal(10))
def path_prior(y):
    """A latent path whose prior is a filter's marginal."""
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    hmm = dist.GaussianHMM(
        dist.Normal(torch.zeros(1), 1.0).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), scale).to_event(1),
        torch.eye(1),
        dist.Normal(torch.zeros(1), 0.5).to_event(1),
        duration=len(y),
    )
    path = pyro.sample("path", hmm)
    pyro.sample("y", dist.Normal(path[:, 0], 0.5).to_event(1), obs=y)
