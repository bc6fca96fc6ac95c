"""Effects that are not normal: gamma, and a mixture of two kinds."""

from __future__ import annotations

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from tests.mixed_models.counts import poisson_log
from tests.mixed_models.priors import beta, exponential, gamma, half_normal, normal
from tests.mixed_models.quadrature import Truth, Values

# --- pumps: 10 pumps, one count each, gamma effects ---------------------------------------------


def pumps(hours, y):
    alpha = pyro.sample("alpha", dist.Exponential(1.0))
    beta = pyro.sample("beta", dist.Gamma(0.1, 1.0))
    with pyro.plate("pump", len(y)):
        rate = pyro.sample("rate", dist.Gamma(alpha, beta))
        pyro.sample("y", dist.Poisson(rate * hours), obs=y)


def pumps_data():
    hours = [94.3, 15.7, 62.9, 126.0, 5.24, 31.4, 1.05, 1.05, 2.1, 10.5]
    return torch.tensor(hours), torch.tensor([5.0, 1, 5, 14, 3, 19, 1, 1, 4, 22])


def log_pumps(t: Values, z: tuple[Tensor, ...], hours: Tensor, y: Tensor) -> Tensor:
    """Negative binomial."""
    hours, y, a, b = hours[..., None], y[..., None], t["alpha"], t["beta"]
    value = torch.lgamma(a + y) - torch.lgamma(a) - torch.lgamma(y + 1)
    return value + a * b.log() + y * hours.log() - (a + y) * (b + hours).log()


PUMPS = Truth({"alpha": exponential(1.0), "beta": gamma(0.1, 1.0)}, log_pumps, dimension=0)


# --- two kinds of customers: 120 of them, simulated, 5 weeks ------------------------------------


def customers(y):
    weight = pyro.sample("weight", dist.Beta(2.0, 2.0))
    low = pyro.sample("low", dist.Normal(0.0, 1.0))
    gap = pyro.sample("gap", dist.HalfNormal(3.0))
    sigma = pyro.sample("sigma", dist.HalfNormal(0.5).expand([2]).to_event(1))
    with pyro.plate("customer", 120, dim=-2):
        kinds = dist.Categorical(torch.stack([1 - weight, weight]))
        effects = dist.Normal(torch.stack([low, low + gap]), sigma)
        u = pyro.sample("u", dist.MixtureSameFamily(kinds, effects))
        with pyro.plate("week", 5, dim=-1):
            pyro.sample("y", dist.Poisson(u.exp()), obs=y)


def customers_data():
    rng = np.random.default_rng(3)
    high = rng.random(120) < 0.35
    u = np.where(high, rng.normal(2.2, 0.3, 120), rng.normal(0.2, 0.4, 120))
    return (torch.tensor(rng.poisson(np.exp(u)[:, None], (120, 5)).astype(float)),)


def log_low(t: Values, z: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return poisson_log(y, t["low"] + t["sigma"][..., None, None, None, 0] * z[0])


def log_high(t: Values, z: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return poisson_log(y, t["low"] + t["gap"] + t["sigma"][..., None, None, None, 1] * z[0])


CUSTOMERS = Truth(
    {
        "weight": beta(2.0, 2.0),
        "low": normal(1.0),
        "gap": half_normal(3.0),
        "sigma": half_normal(0.5, 2),
    },
    (log_low, log_high),
    lambda t: (torch.log1p(-t["weight"]), t["weight"].log()),
)
