"""Stochastic volatility with its path integrated out, beside joint NUTS of ours and NumPyro's."""

from __future__ import annotations

import csv
import gzip
import importlib.util
import time
from pathlib import Path
from typing import Any

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.competitors import numpyro_run
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS, PseudoMarginalNUTS, marginalize, whiten
from pyro_hamflow.model.potential import Potential

ABOUT = "Latent paths: stochastic volatility"
_CHAINS, _DRAWS, _WARMUP = 4, 300, 200
_WANTED = 15.0  # times NumPyro's effective draws per second, at the longest length


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


def _joint(y: Any, *, centred: bool) -> None:
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


def measure(*, quick: bool) -> list[Table]:
    """Effective draws per second of each sampler, and what an estimate costs by length."""
    torch.set_default_dtype(torch.float64)
    lengths = (100,) if quick else (500, 2000)
    rows = []
    for name, data in (("simulated", simulated), ("S&P 500", stocks)):
        for length in lengths:
            if (y := data(length)) is not None:
                rows += _beside(name, y)
    best: dict[tuple[Any, Any], dict[bool, float]] = {}
    for row in rows:
        of = best.setdefault((row["data"], row["length"]), {})
        ours = row["sampler"].startswith(("marginalize", "whitened"))
        of[ours] = max(of.get(ours, 0.0), float(row["ESS per second"]))
    last = best["simulated", lengths[-1]]
    times = last[True] / last[False]
    speed = Table(
        "Four chains of 300 draws",
        rows,
        "ESS is the smallest of mean, phi and scale, in the bulk; seconds are of the CPU, one "
        "thread, sampling alone, and with all that comes before. Joint samplers have the path "
        "among their parameters, centred or as standard noise.",
        f"simulated, T = {lengths[-1]}: at least {_WANTED:.0f} times the best joint sampler's "
        f"effective draws per second: {met(times >= _WANTED)} ({times:.1f}).",
    )
    costs = [_cost(length) for length in ((100, 200) if quick else (500, 2000, 8000, 20000))]
    growth = costs[-1]["ms"] / costs[0]["ms"] / (costs[-1]["length"] / costs[0]["length"])
    cost = Table(
        "One gradient of four chains, by length",
        costs,
        "Of the estimate with one particle, the Gaussian path's factors and their gradients "
        "included; not compiled.",
        f"cost grows no faster than length: {met(growth <= 1.0)} ({growth:.2f} of it).",
    )
    return [speed, cost]


def _beside(name: str, y: Tensor) -> list[Row]:
    marginal = PseudoMarginalNUTS(marginalize(volatility, ["path"]))
    samplers = {
        "marginalize": lambda: _ours(marginal, y),
        "whitened, ours": lambda: _ours(NUTS(whiten(volatility, ["path"])), y),
        "joint NUTS, ours, centred": lambda: _ours(NUTS(volatility), y),
    }
    for way in ("centred", "standard noise"):
        samplers[f"joint NUTS, NumPyro, {way}"] = lambda way=way: _numpyro(y, way == "centred")
    return [
        {"data": name, "length": len(y), "sampler": sampler} | run()
        for sampler, run in samplers.items()
    ]


def _ours(kernel: Any, y: Tensor) -> Row:
    ticks: list[float] = []
    began = time.process_time()
    mcmc = MCMC(
        kernel,
        _DRAWS,
        _WARMUP,
        num_chains=_CHAINS,
        seed=0,
        disable_progbar=True,
        hook_fn=lambda *_: ticks.append(time.process_time()),
    )
    mcmc.run(y)
    draws = mcmc.get_samples(group_by_chain=True)
    parts = [draws[name].numpy() for name in ("mean", "phi", "scale")]
    found = _row(parts, ticks[-1] - ticks[_WARMUP - 1], ticks[-1] - began)
    return found | {"variance": kernel.settings.get("log_likelihood_variance", "")}


def _numpyro(y: Tensor, centred: bool) -> Row:  # noqa: FBT001
    began = time.process_time()
    run = numpyro_run(
        lambda y: _joint(y, centred=centred),
        (jnp.asarray(y.numpy()),),
        chains=_CHAINS,
        warmup=_WARMUP,
        draws=_DRAWS,
        dense=False,
    )
    total = time.process_time() - began
    # Leaves are in the order of names: mean, path, phi, scale.
    parts = [run.draws[..., i] for i in (0, -2, -1)]
    wall = run.preparing + run.warming + run.sampling
    return _row(parts, total * run.sampling / wall, total) | {"variance": ""}


def _row(parts: list[np.ndarray], sampling: float, total: float) -> Row:
    smallest = min(float(arviz.ess(part)) for part in parts)
    return {
        "smallest ESS": smallest,
        "R-hat": max(float(arviz.rhat(part)) for part in parts),
        "ESS per second": smallest / sampling,
        "with warm-up": smallest / total,
    }


def _cost(length: int) -> Row:
    y = simulated(length)
    marginal = marginalize(volatility, ["path"], num_particles=1)
    values = {"mean": -0.5, "phi": 0.985, "scale": 0.2}
    marginal.fit(y, pilot={name: torch.tensor(value) for name, value in values.items()})
    potential = Potential(marginal, (y,), separate_noise=True)
    position, noise = potential.vectors(_CHAINS)
    potential.gradients(position, noise)
    began, calls = time.process_time(), 10
    for _ in range(calls):
        potential.gradients(position, noise)
    return {"length": length, "ms": 1e3 * (time.process_time() - began) / calls}
