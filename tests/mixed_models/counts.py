"""Counts: Poisson, negative binomial and zero-inflated, with normal and gamma effects."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.mixed_models.frames import Wide, linear, r_data
from tests.mixed_models.priors import (
    beta,
    correlation,
    exponential,
    half_cauchy,
    half_normal,
    normal,
)
from tests.mixed_models.quadrature import Truth, Values


def poisson_log(y: Tensor, log_rate: Tensor) -> Tensor:
    """The log probability of counts."""
    return y * log_rate - log_rate.exp() - torch.lgamma(y + 1)


# --- epilepsy: 59 patients, 4 visits ----------------------------------------------------------


def epilepsy(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    with pyro.plate("patient", 59, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("visit", 4, dim=-1):
            pyro.sample("y", dist.Poisson((x @ beta + u).exp()), obs=y)


def epilepsy_data():
    frame = r_data("MASS", "epil")
    wide = Wide(frame, "subject")
    return wide.design(frame.lbase, frame.trt == "progabide"), wide(frame.y)


def log_poisson(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    return poisson_log(y, linear(t["beta"], x) + t["sigma"] * z[0])


EPILEPSY = Truth({"beta": normal(10.0, 3), "sigma": half_normal(2.0)}, log_poisson)


# --- epilepsy with a trend of each patient's own ----------------------------------------------


def epilepsy_slopes(x, time, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(1.0).expand([2]).to_event(1))
    factor = pyro.sample("factor", dist.LKJCholesky(2, 1.0))
    with pyro.plate("patient", 59, dim=-2):
        u = pyro.sample(
            "u",
            dist.MultivariateNormal(torch.zeros(2), scale_tril=scale.unsqueeze(-1) * factor),
        )
        with pyro.plate("visit", 4, dim=-1):
            log_rate = x @ beta + u[..., 0] + u[..., 1] * time
            pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def epilepsy_slopes_data():
    frame = r_data("MASS", "epil")
    wide = Wide(frame, "subject")
    x, y = epilepsy_data()
    return x, wide((frame.period - 2.5) / 5), y


def log_poisson_slopes(t: Values, z: tuple[Tensor, ...], x: Tensor, time: Tensor, y: Tensor):
    scale = t["scale"][..., None, None, None, :]
    slope = t["factor"] * z[0] + (1 - t["factor"] ** 2).sqrt() * z[1]
    effect = scale[..., 0] * z[0] + scale[..., 1] * slope * time
    return poisson_log(y, linear(t["beta"], x) + effect)


EPILEPSY_SLOPES = Truth(
    {"beta": normal(10.0, 3), "scale": half_cauchy(1.0, 2), "factor": correlation()},
    log_poisson_slopes,
    dimension=2,
)


# --- ticks: 118 broods of 1 to 10 grouse chicks -------------------------------------------------


def ticks(x, brood, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    concentration = pyro.sample("concentration", dist.Exponential(1.0))
    with pyro.plate("broods", 118):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
    with pyro.plate("chicks", len(y)):
        mean = (x @ beta + u[brood]).exp()
        pyro.sample("y", dist.GammaPoisson(concentration, concentration / mean), obs=y)


def ticks_data():
    frame = r_data("lme4", "grouseticks")
    wide = Wide(frame, "BROOD")
    x = wide.design(frame.YEAR == 96, frame.YEAR == 97, frame.cHEIGHT / 100)
    return x, wide(frame.TICKS), wide.seen


def ticks_rows():
    x, y, _ = ticks_data()
    wide = Wide(r_data("lme4", "grouseticks"), "BROOD")
    return wide.rows(x), wide.index, wide.rows(y)


def log_negative_binomial(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor, seen: Tensor):
    k, log_mean = t["concentration"], linear(t["beta"], x) + t["sigma"] * z[0]
    value = torch.lgamma(y + k) - torch.lgamma(k) - torch.lgamma(y + 1)
    value = value + y * log_mean + k * k.log() - (k + y) * torch.logaddexp(k.log(), log_mean)
    return value * seen


TICKS = Truth(
    {"beta": normal(10.0, 4), "sigma": half_cauchy(2.5), "concentration": exponential(1.0)},
    log_negative_binomial,
)


# --- salmonella: 18 plates, one count each ------------------------------------------------------


def salmonella(dose, y):
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    slope = pyro.sample("beta", dist.Normal(0.0, 10.0))
    trend = pyro.sample("gamma", dist.Normal(0.0, 10.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("dish", len(y)):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        log_rate = alpha + slope * (dose + 10).log() + trend * dose / 1000 + u
        pyro.sample("y", dist.Poisson(log_rate.exp()), obs=y)


def salmonella_data():
    frame = r_data("aod", "salmonella")
    return tuple(torch.tensor(frame[name].to_numpy(dtype=float)) for name in ("dose", "y"))


def log_salmonella(t: Values, z: tuple[Tensor, ...], dose: Tensor, y: Tensor) -> Tensor:
    dose, y = dose[..., None], y[..., None]
    log_rate = t["alpha"] + t["beta"] * (dose + 10).log() + t["gamma"] * dose / 1000
    return poisson_log(y, log_rate + t["sigma"] * z[0])


SALMONELLA = Truth(
    {name: normal(10.0) for name in ("alpha", "beta", "gamma")} | {"sigma": half_normal(1.0)},
    log_salmonella,
)


# --- drivers killed or injured: 16 years of 12 months, 1,000 to 2,700 a month -------------------


def drivers(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([4]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("year", 16, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("month", 12, dim=-1):
            pyro.sample("y", dist.Poisson((x @ beta + u).exp()), obs=y)


def drivers_data():
    frame = r_data("datasets", "UKDriverDeaths")
    year = np.floor(frame.time + 1e-6)
    wide = Wide(frame.assign(year=year), "year")
    angle = 2 * np.pi * (frame.time - year)
    law = frame.time > 1983.08
    return wide.design(law, np.cos(angle), np.sin(angle)), wide(frame.value)


DRIVERS = Truth({"beta": normal(10.0, 4), "sigma": half_normal(1.0)}, log_poisson)


# --- melanoma: 354 counties of 9 nations, 0 to 313 deaths ---------------------------------------


def melanoma(x, log_expected, nation, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    with pyro.plate("nations", 9):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
    with pyro.plate("counties", len(y)):
        pyro.sample("y", dist.Poisson((log_expected + x @ beta + u[nation]).exp()), obs=y)


def melanoma_data():
    frame = r_data("mlmRev", "Mmmec")
    wide = Wide(frame, "nation")
    x = wide.design(frame.uvb / 10)
    return x, wide(np.log(frame.expected)), wide(frame.deaths), wide.seen


def melanoma_rows():
    x, log_expected, y, _ = melanoma_data()
    wide = Wide(r_data("mlmRev", "Mmmec"), "nation")
    return wide.rows(x), wide.rows(log_expected), wide.index, wide.rows(y)


def log_melanoma(t: Values, z, x: Tensor, log_expected: Tensor, y: Tensor, seen: Tensor):
    return poisson_log(y, log_expected + linear(t["beta"], x) + t["sigma"] * z[0]) * seen


MELANOMA = Truth({"beta": normal(10.0, 2), "sigma": half_cauchy(1.0)}, log_melanoma)


# --- visits to the doctor: 200 people in 5 years, many who never go -----------------------------


def doctor(x, y):
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([3]).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(2.0))
    never = pyro.sample("never", dist.Beta(1.0, 1.0))
    with pyro.plate("person", 200, dim=-2):
        u = pyro.sample("u", dist.Normal(0.0, sigma))
        with pyro.plate("year", 5, dim=-1):
            rate = (x @ beta + u).exp()
            pyro.sample("y", dist.ZeroInflatedPoisson(rate, gate=never), obs=y)


def doctor_data():
    frame = r_data("COUNT", "rwm5yr")
    frame = frame[frame.groupby("id").id.transform("size") == 5].head(1000)
    wide = Wide(frame, "id")
    return wide.design((frame.age - 45) / 10, frame.female), wide(frame.docvis)


def log_zero_inflated(t: Values, z: tuple[Tensor, ...], x: Tensor, y: Tensor) -> Tensor:
    log_rate = linear(t["beta"], x) + t["sigma"] * z[0]
    some = torch.log1p(-t["never"]) + poisson_log(y, log_rate)
    return torch.where(y == 0, torch.logaddexp(t["never"].log(), some), some)


DOCTOR = Truth(
    {"beta": normal(10.0, 3), "sigma": half_normal(2.0), "never": beta(1.0, 1.0)}, log_zero_inflated
)
