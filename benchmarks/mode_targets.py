"""Posteriors of several modes, and what is known of them; and a funnel."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

_PERIODS = torch.tensor([3, 3.65, 4.5, 6.5, 9, 11.8, 14.5, 20, 35, 60, 150, 300])
# By a grid, the linear parameters integrated in closed form.
_SHARES = torch.tensor(
    [0.0483, 0.0735, 0.0207, 0.0291, 0.4609, 0.1068, 0.0025, 0.0778, 0.1763, 0.0028, 0.0011]
)
_TIMES = torch.tensor(
    [14.55, 31.42, 67.77, 85.89, 92.04, 97.91, 109.32, 144.34, 156.89, 162.40, 169.75, 175.72],
    dtype=torch.float64,
)
_VELOCITIES = torch.tensor(
    [-1.71, 6.12, -1.66, 8.27, -5.65, 0.26, 0.98, -4.00, 3.01, 3.77, 3.67, -0.98],
    dtype=torch.float64,
)

# E|m| of :func:`torus` at L = 8 by its coupling, and its standard error.
MEAN_SIZES = {0.5: (0.1741, 0.0006), 0.75: (0.9467, 0.0009)}


@dataclass(frozen=True)
class Target:
    """A posterior, and what is known of it.

    Attributes:
        name: What it is called.
        model: The model.
        log_evidence: The logarithm of its evidence.
        belongs: Shares of what is asked for, ``(draws, shares)``, from draws of its site or sites.
        shares: The true ones.
        density: Its name for :mod:`benchmarks.mode_runs.densities`.
    """

    name: str
    model: Callable[..., None]
    log_evidence: float
    belongs: Callable[[dict[str, Tensor]], Tensor]
    shares: Tensor
    density: str


def _normal(dimension: int, scale: float) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(dimension), scale).to_event(1)


def mixture(dimension: int) -> Target:
    """Two normals of variance .5 about -2.5 and 2.5, one to three."""
    prior, part = _normal(dimension, 5.0), _normal(dimension, 0.5**0.5)

    def model() -> None:
        x = pyro.sample("x", prior)
        parts = [part.log_prob(x + 2.5) + math.log(0.25), part.log_prob(x - 2.5) + math.log(0.75)]
        pyro.factor("density", torch.logaddexp(*parts) - prior.log_prob(x))

    def belongs(values: dict[str, Tensor]) -> Tensor:
        return (values["x"].sum(-1, keepdim=True) < 0.0).double()

    return Target(
        f"mixture, d = {dimension}",
        model,
        0.0,
        belongs,
        torch.tensor([0.25]),
        f"mixture {dimension}",
    )


def exoplanet() -> Target:
    """The radial velocity of a star: the shares are those of eleven bins of the period."""
    low, high = math.log(3.0), math.log(300.0)

    def model() -> None:
        v0 = pyro.sample("v0", dist.Normal(0.0, 5.0))
        amplitude = pyro.sample("amplitude", dist.Normal(5.0, 3.0))
        phase = pyro.sample("phase", dist.Uniform(0.0, 2.0 * math.pi))
        log_period = pyro.sample("log_period", dist.Uniform(low, high))
        mean = v0 + amplitude * torch.cos(2.0 * math.pi * _TIMES / log_period.exp() + phase)
        with pyro.plate("time", len(_TIMES)):
            pyro.sample("v", dist.Normal(mean, 2.5), obs=_VELOCITIES)

    def belongs(values: dict[str, Tensor]) -> Tensor:
        period = values["log_period"].exp()[:, None]
        return ((period >= _PERIODS[:-1]) & (period < _PERIODS[1:])).double()

    return Target("exoplanet", model, -35.948077, belongs, _SHARES, "exoplanet")


def phi_four(size: int = 100) -> Target:
    """A field in one dimension of either sign, about its Gaussian part."""
    a, beta = 0.1, 20.0
    links = 2.0 * torch.eye(size) - torch.diag(torch.ones(size - 1), 1)
    links = links - torch.diag(torch.ones(size - 1), -1)
    precision = beta * (a * size * links + torch.eye(size) / (a * size))
    prior = dist.MultivariateNormal(torch.zeros(size), precision_matrix=precision)

    def model(tilt: float = 0.0) -> None:
        x = pyro.sample("x", prior)
        inner = (x[1:] - x[:-1]).square().sum() + x[0] ** 2 + x[-1] ** 2
        energy = 0.5 * a * size * inner
        energy = energy + ((1.0 - x.square()).square() / 4.0 + tilt * x).sum() / (a * size)
        pyro.factor("density", -beta * energy - prior.log_prob(x))

    def belongs(values: dict[str, Tensor]) -> Tensor:
        return (values["x"].mean(-1, keepdim=True) > 0.0).double()

    half, evidence = torch.tensor([0.5]), -196.91222 if size == 100 else math.nan
    return Target(f"phi^4, N = {size}", model, evidence, belongs, half, f"phi4 {size}")


def many_well(pairs: int = 16) -> Target:
    """A double well for each pair of coordinates: the shares are those of the larger wells."""
    prior = _normal(2 * pairs, 2.0)

    def model() -> None:
        x = pyro.sample("x", prior)
        a, b = x[:pairs], x[pairs:]
        energy = (a**4 - 6.0 * a.square() - 0.5 * a).sum() + 0.5 * b.square().sum()
        pyro.factor("density", -energy - prior.log_prob(x))

    def belongs(values: dict[str, Tensor]) -> Tensor:
        return (values["x"][:, :pairs] > 0.0).double()

    shares = torch.full((pairs,), 0.844307)
    size, evidence = 2 * pairs, 10.29347971 * pairs
    return Target(f"many-well, d = {size}", model, evidence, belongs, shares, f"wells {size}")


def torus(size: int, coupling: float) -> None:
    """A field of either sign on a torus, coupled to its neighbours."""
    prior = dist.Normal(torch.zeros(size, size), 1.0).to_event(2)
    field = pyro.sample("field", prior)
    links = field * (field.roll(1, -1) + field.roll(1, -2))
    wells = field.square() + 0.5 * (field.square() - 1.0).square()
    density = coupling * links.sum((-1, -2)) - wells.sum((-1, -2))
    pyro.factor("boltzmann", density - prior.log_prob(field))


def funnel(dimension: int = 101) -> Callable[[], None]:
    """A logarithm of a variance, and normals of that variance."""

    def model() -> None:
        scale = pyro.sample("scale", dist.Normal(0.0, 3.0))
        pyro.sample("x", dist.Normal(torch.zeros(dimension - 1), (scale / 2).exp()).to_event(1))

    return model
