"""Models with a latent path or process, for Pyro and for NumPyro, and their data."""

from __future__ import annotations

import csv
import gzip
import importlib.util
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_JITTER = 1e-6  # of a process' variances


class Autoregression(dist.TorchDistribution):
    """A stationary path about a mean."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector
    has_rsample = True

    def __init__(self, centre: Tensor, phi: Tensor, scale: Tensor, length: int) -> None:
        self.centre, self.phi, self.scale = centre, phi, scale
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        x = value - self.centre
        first = dist.Normal(0.0, self.scale / (1 - self.phi**2).sqrt()).log_prob(x[..., 0])
        return first + dist.Normal(self.phi * x[..., :-1], self.scale).log_prob(x[..., 1:]).sum(-1)

    def rsample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.centre + self.scale * torch.randn(*sample_shape, *self.event_shape)


def volatility(y: Tensor) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
    phi = 2 * pyro.sample("phi", dist.Beta(20.0, 1.5)) - 1
    scale = pyro.sample("scale", dist.HalfNormal(0.5))
    path = pyro.sample("path", Autoregression(mean, phi, scale, len(y)))
    pyro.sample("y", dist.Normal(0.0, (path / 2).exp()).to_event(1), obs=y)


def joint_volatility(y: Any, *, centred: bool) -> None:
    """The same for NumPyro."""
    mean = numpyro.sample("mean", ndist.Normal(0.0, 3.0))
    phi = 2 * numpyro.sample("phi", ndist.Beta(20.0, 1.5)) - 1
    scale = numpyro.sample("scale", ndist.HalfNormal(0.5))
    wide = scale / jnp.sqrt(1 - phi**2)
    if centred:
        path = numpyro.sample("path", ndist.ImproperUniform(ndist.constraints.real, (), y.shape))
        x = path - mean
        numpyro.factor("first", ndist.Normal(0.0, wide).log_prob(x[0]))
        numpyro.factor("rest", ndist.Normal(phi * x[:-1], scale).log_prob(x[1:]).sum())
    else:
        z = numpyro.sample("path", ndist.Normal(0.0, 1.0).expand(y.shape))

        def move(before: Any, z: Any) -> tuple[Any, Any]:
            return (after := phi * before + scale * z), after

        rest = jax.lax.scan(move, wide * z[0], z[1:])[1]
        path = mean + jnp.concatenate([wide * z[:1], rest])
    numpyro.sample("y", ndist.Normal(0.0, jnp.exp(path / 2)), obs=y)


def steps(y: Tensor) -> None:
    """Counts of a random walk, as its steps."""
    scale = pyro.sample("scale", dist.HalfNormal(0.5))
    level = pyro.sample("level", dist.Normal(0.0, 2.0))
    with pyro.plate("time", len(y)):
        step = pyro.sample("step", dist.Normal(0.0, scale))
        pyro.sample("y", dist.Poisson((level + step.cumsum(-1)).exp()), obs=y)


def counts(length: int) -> Tensor:
    """Counts whose log rate is a random walk about one."""
    rng = np.random.default_rng(1)
    walk = np.cumsum(0.2 * rng.standard_normal(length))
    return torch.tensor(rng.poisson(np.exp(1.0 + 0.9 * walk / np.abs(walk).max())).astype(float))


def simulated(length: int) -> Tensor:
    """Returns of a simulated price."""
    rng, path = np.random.default_rng(0), np.empty(length)
    path[0] = 0.2 / np.sqrt(1 - 0.97**2) * rng.standard_normal()
    for t in range(1, length):
        path[t] = 0.97 * path[t - 1] + 0.2 * rng.standard_normal()
    return torch.tensor(np.exp((path - 0.5) / 2) * rng.standard_normal(length))


def stocks(length: int) -> Tensor | None:
    """The last returns of the S&P 500 that package arch has, in per cent; none without it."""
    found = importlib.util.find_spec("arch")
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(found.submodule_search_locations[0])
    with gzip.open(folder / "data" / "sp500" / "sp500.csv.gz", "rt") as file:
        prices = [float(row["Adj Close"]) for row in csv.DictReader(file)]
    returns = 100 * np.diff(np.log(prices))[-length:]
    return torch.tensor(returns - returns.mean())


def classification(x: Tensor, y: Tensor) -> None:
    """A latent Gaussian process of binary data."""
    length = pyro.sample("length", dist.LogNormal(0.0, 0.7))
    size = pyro.sample("size", dist.HalfNormal(2.0))
    gap = (x[:, None] - x) / length
    kernel = size.square() * (-0.5 * gap.square()).exp() + _JITTER * torch.eye(len(x))
    f = pyro.sample("f", dist.MultivariateNormal(torch.zeros(len(x)), kernel))
    pyro.sample("y", dist.Bernoulli(logits=f).to_event(1), obs=y)


def joint_classification(x: Any, y: Any) -> None:
    """The same for NumPyro, its process as standard noise."""
    length = numpyro.sample("length", ndist.LogNormal(0.0, 0.7))
    size = numpyro.sample("size", ndist.HalfNormal(2.0))
    gap = (x[:, None] - x) / length
    kernel = size**2 * jnp.exp(-0.5 * gap**2) + _JITTER * jnp.eye(len(x))
    z = numpyro.sample("f", ndist.Normal(0.0, 1.0).expand(x.shape))
    numpyro.sample("y", ndist.Bernoulli(logits=jnp.linalg.cholesky(kernel) @ z), obs=y)


def binary(count: int) -> tuple[Tensor, Tensor]:
    """Places, and binary data whose odds are a wave of them."""
    x = torch.linspace(0.0, 5.0, count)
    uniform = torch.tensor(np.random.default_rng(0).random(count))
    return x, (uniform < (2.0 * (2.0 * x).sin()).sigmoid()).double()


_MONTH = 1.0 / 12.0
_MATURITIES = torch.tensor([0.25, 1.0, 2.0, 5.0, 7.0, 10.0, 15.0, 20.0, 30.0], dtype=torch.float64)
_WIDTHS = torch.tensor([0.5, 1.0, 2.0, 2.0, 2.5, 4.0, 5.0, 7.5, 10.0], dtype=torch.float64)


def _yields(r: Any, w: Any, supply: Any, kappa: Any, rbar: Any, s_r: Any, gamma: Any) -> Any:
    duration = (1.0 - (-kappa * _MATURITIES).exp()) / kappa
    b = duration / _MATURITIES
    risk = gamma * (supply * duration * _WIDTHS).sum(-1, keepdim=True) * (-w).exp()
    rest = (1.0 - (-2.0 * kappa * _MATURITIES).exp()) / (2.0 * kappa * _MATURITIES)
    mean = b * r + (1.0 - b) * (rbar + s_r**2 * risk / kappa)
    return mean - s_r**2 / (2.0 * kappa**2) * (1.0 - 2.0 * b + rest)


class Steps(dist.TorchDistribution):
    """A path whose every state is normal about `slope` times the last one, and a drift."""

    arg_constraints: dict[str, Any] = {}
    support = dist.constraints.real_vector

    def __init__(self, first: Any, slope: Any, drift: Tensor, scale: Tensor, length: int) -> None:
        self.first, self.slope, self.drift, self.scale = first, slope, drift, scale
        super().__init__(torch.Size(), torch.Size([length]), validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        mean = self.slope * value[:-1] + self.drift
        steps = dist.Normal(mean, self.scale).log_prob(value[1:])
        return self.first.log_prob(value[0]) + steps.sum()

    def sample(self, sample_shape: tuple[int, ...] = ()) -> Tensor:
        return self.first.sample() + 0.01 * torch.randn(self.event_shape)


def premium(yields: Tensor, supply: Tensor) -> None:
    """Yields of bonds by a short rate and investors' wealth, as in the gallery of tutorials."""
    medians = {"kappa": 0.25, "s_r": 0.01, "gamma": 5.0, "s_w": 0.1, "s_e": 0.001}
    p = {
        name: pyro.sample(name, dist.LogNormal(np.log(median), 1.0 if name == "gamma" else 0.5))
        for name, median in medians.items()
    }
    rbar = pyro.sample("rbar", dist.Normal(0.03, 0.015))
    omega = pyro.sample("omega", dist.Normal(0.03, 0.03))
    keep = (-p["kappa"] * _MONTH).exp()
    spread = p["s_r"] / (2.0 * p["kappa"]).sqrt()
    first, step = dist.Normal(rbar, spread), spread * (1.0 - keep**2).sqrt()
    r = pyro.sample("r", Steps(first, keep, rbar * (1.0 - keep), step, len(supply)))
    drift, step = omega * _MONTH, p["s_w"] * _MONTH**0.5
    w = pyro.sample("w", Steps(dist.Normal(drift, step), 1.0, drift, step, len(supply) - 1))
    w = torch.cat([w.new_zeros(1), w])
    mean = _yields(r[:, None], w[:, None], supply, p["kappa"], rbar, p["s_r"], p["gamma"])
    pyro.sample("y", dist.Normal(mean, p["s_e"]).to_event(2), obs=yields)


def bonds(months: int) -> tuple[Tensor, Tensor]:
    """Simulated yields of nine maturities, and the supply of bonds of each."""
    rng, keep = np.random.default_rng(7), np.exp(-0.25 * _MONTH)
    level = np.zeros((2, months))
    for t in range(1, months):
        level[:, t] = 0.98 * level[:, t - 1] + 0.07 * rng.standard_normal(2)
    tilt = level[:1].T + np.outer(level[1], 0.5 * np.log(_MATURITIES.numpy() / 5.0))
    supply = torch.from_numpy(0.05 * np.exp(tilt + 0.04 * _MONTH * np.arange(months)[:, None]))
    r, w = np.full((months, 1), 0.02), np.zeros((months, 1))
    for t in range(1, months):
        shock = 0.012 * np.sqrt((1.0 - keep**2) / 0.5) * rng.standard_normal()
        r[t] = 0.03 + keep * (r[t - 1] - 0.03) + shock
        w[t] = w[t - 1] + 0.04 * _MONTH + 0.1 * np.sqrt(_MONTH) * rng.standard_normal()
    exact = _yields(
        *map(torch.from_numpy, (r, w)), supply, torch.tensor(0.25).double(), 0.03, 0.012, 5.0
    )
    return exact + 0.001 * torch.from_numpy(rng.standard_normal(exact.shape)), supply
