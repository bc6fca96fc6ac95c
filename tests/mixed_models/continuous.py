"""Measurements: normal, Student-t, gamma, beta; and survival times with a frailty."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from torch import Tensor

from tests.mixed_models.frames import Wide, linear, r_data
from tests.mixed_models.priors import correlation, gamma, half_cauchy, half_normal, normal
from tests.mixed_models.quadrature import Truth, Values


def normal_log(y: Tensor, mean: Tensor, sd: Tensor) -> Tensor:
    """The log density of normal measurements."""
    return -0.5 * ((y - mean) / sd) ** 2 - sd.log() - 0.5 * math.log(2 * math.pi)


# --- sleep: 18 people, 10 days, intercept and slope correlated ----------------------------------


def sleep(days, y):
    mean = pyro.sample("mean", dist.Normal(3.0, 1.0))
    trend = pyro.sample("trend", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.HalfNormal(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("person", 18, dim=-2):
        u = pyro.sample(
            "u",
            dist.MultivariateNormal(
                torch.stack([mean, trend]), scale_tril=scale.unsqueeze(-1) * factor
            ),
        )
        with pyro.plate("day", 10, dim=-1):
            pyro.sample("y", dist.Normal(u[..., 0] + u[..., 1] * days, sigma), obs=y)


def sleep_data():
    frame = r_data("lme4", "sleepstudy")
    wide = Wide(frame, "Subject")
    return wide(frame.Days), wide(frame.Reaction / 100)


def log_sleep(t: Values, z: tuple[Tensor, ...], days: Tensor, y: Tensor) -> Tensor:
    scale = t["scale"][..., None, None, None, :]
    slope = t["factor"] * z[0] + (1 - t["factor"] ** 2).sqrt() * z[1]
    line = t["mean"] + scale[..., 0] * z[0] + (t["trend"] + scale[..., 1] * slope) * days
    return normal_log(y, line, t["sigma"])


SLEEP = Truth(
    {
        "mean": normal(1.0, mean=3.0),
        "trend": normal(1.0),
        "scale": half_normal(1.0, 2),
        "factor": correlation(),
        "sigma": half_normal(1.0),
    },
    log_sleep,
    dimension=2,
)


# --- reaction times of the same people, gamma with log link -------------------------------------


def reactions(days, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    shape = pyro.sample("shape", dist.Gamma(2.0, 0.05))
    with pyro.plate("person", 18, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("day", 10, dim=-1):
            mean = (alpha + slope * days + u).exp()
            pyro.sample("y", dist.Gamma(shape, shape / mean), obs=y)


def log_reactions(t: Values, z: tuple[Tensor, ...], days: Tensor, y: Tensor) -> Tensor:
    log_mean = t["alpha"] + t["slope"] * days + t["sigma"] * z[0]
    k = t["shape"]
    log_rate = k.log() - log_mean
    return k * log_rate - torch.lgamma(k) + (k - 1) * y.log() - log_rate.exp() * y


REACTIONS = Truth(
    {
        "alpha": normal(10.0),
        "slope": normal(10.0),
        "sigma": half_normal(1.0),
        "shape": gamma(2.0, 0.05),
    },
    log_reactions,
)


# --- gasoline: the yield of 10 crude oils at 2 to 4 temperatures --------------------------------


def gasoline(temperature, y, seen):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    precision = pyro.sample("precision", dist.Gamma(1.0, 0.01))
    oils, samples = y.shape
    with pyro.plate("oil", oils, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("sample", samples, dim=-1), poutine.mask(mask=seen):
            mean = torch.sigmoid(alpha + slope * temperature + u)
            pyro.sample("y", dist.Beta(mean * precision, (1 - mean) * precision), obs=y)


def gasoline_data():
    frame = r_data("betareg", "GasolineYield")
    wide = Wide(frame, "batch")
    y = wide(frame["yield"])
    return wide((frame.temp - 330) / 100), torch.where(wide.seen, y, 0.5), wide.seen


def log_beta(t: Values, z, temperature: Tensor, y: Tensor, seen: Tensor) -> Tensor:
    mean = torch.sigmoid(t["alpha"] + t["slope"] * temperature + t["sigma"] * z[0])
    k = t["precision"]
    a, b = mean * k, (1 - mean) * k
    value = torch.lgamma(k) - torch.lgamma(a) - torch.lgamma(b)
    return (value + (a - 1) * y.log() + (b - 1) * torch.log1p(-y)) * seen


GASOLINE = Truth(
    {
        "alpha": normal(10.0),
        "slope": normal(10.0),
        "sigma": half_normal(1.0),
        "precision": gamma(1.0, 0.01),
    },
    log_beta,
)


# --- orthodontic growth: 27 children, 4 ages, heavy tails ---------------------------------------


def growth(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 20.0).expand([3]).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.0))
    with pyro.plate("child", 27, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, tau))
        with pyro.plate("age", 4, dim=-1):
            pyro.sample("y", dist.StudentT(4.0, x @ beta + u, sigma), obs=y)


def growth_data():
    frame = r_data("nlme", "Orthodont")
    wide = Wide(frame, "Subject")
    return wide.design(frame.age - 11, frame.Sex == "Female"), wide(frame.distance)


def log_growth(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    error = (y - linear(t["beta"], x) - t["tau"] * z[0]) / t["sigma"]
    constant = math.lgamma(2.5) - math.lgamma(2.0) - 0.5 * math.log(4 * math.pi)
    return constant - t["sigma"].log() - 2.5 * torch.log1p(error**2 / 4)


GROWTH = Truth(
    {"beta": normal(20.0, 3), "tau": half_cauchy(2.0), "sigma": half_cauchy(2.0)}, log_growth
)


# --- oats: 6 blocks of 12 plots -----------------------------------------------------------------


def oats(nitrogen, y):
    alpha = pyro.sample("alpha", dist.Normal(100.0, 50.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 100.0))
    tau = pyro.sample("tau", dist.HalfCauchy(20.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(20.0))
    with pyro.plate("block", 6, dim=-2):
        u = pyro.sample("u", dist.Normal(alpha, tau))
        with pyro.plate("plot", 12, dim=-1):
            pyro.sample("y", dist.Normal(u + slope * nitrogen, sigma), obs=y)


def oats_data():
    frame = r_data("nlme", "Oats")
    wide = Wide(frame, "Block")
    return wide(frame.nitro), wide(frame["yield"])


def log_oats(t: Values, z: tuple[Tensor, ...], nitrogen: Tensor, y: Tensor) -> Tensor:
    return normal_log(y, t["alpha"] + t["tau"] * z[0] + t["slope"] * nitrogen, t["sigma"])


OATS = Truth(
    {
        "alpha": normal(50.0, mean=100.0),
        "slope": normal(100.0),
        "tau": half_cauchy(20.0),
        "sigma": half_cauchy(20.0),
    },
    log_oats,
)


# --- kidney: 38 patients, 2 times to infection each, some censored, log-normal frailty ----------


def kidney(x, time, event):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    shape = pyro.sample("shape", dist.Gamma(1.0, 1.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("patient", 38, dim=-2):
        frailty = pyro.sample("frailty", dist.LogNormal(0.0, sigma))
        with pyro.plate("catheter", 2, dim=-1):
            rate = frailty * (x @ beta).exp()
            hazard = shape * rate * time ** (shape - 1)
            pyro.factor("survival", event * hazard.log() - rate * time**shape)


def kidney_data():
    frame = r_data("survival", "kidney")
    wide = Wide(frame, "id")
    return (
        wide.design(frame.sex == 2, frame.age / 10 - 4),
        wide(frame.time / 100),
        wide(frame.status),
    )


def log_kidney(t: Values, z, x: Tensor, time: Tensor, event: Tensor) -> Tensor:
    log_rate = linear(t["beta"], x) + t["sigma"] * z[0]
    k = t["shape"]
    return event * (k.log() + log_rate + (k - 1) * time.log()) - (log_rate + k * time.log()).exp()


KIDNEY = Truth(
    {"beta": normal(10.0, 3), "shape": gamma(1.0, 1.0), "sigma": half_normal(2.0)}, log_kidney
)
