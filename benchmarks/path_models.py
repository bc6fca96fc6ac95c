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
