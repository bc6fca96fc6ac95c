"""Joint or conditional moves: which serve, by the variance of the estimate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from benchmarks.diagnostics import largest_rhat, smallest_ess
from benchmarks.report import Row, Table
from pyro_hamflow import MCMC, PseudoMarginalNUTS, marginalize, noise

ABOUT = "Pseudo-marginal NUTS: joint or conditional"
_GROUPS, _SLOPE = 40, 2.0


def measure(*, quick: bool) -> list[Table]:
    """One latent-variable model, its noise in one block and in forty."""
    sizes = (2, 64) if quick else (2, 4, 8, 16, 32, 64)
    rows = []
    for blocks, make in (("one", _by_hand), ("forty", _marginal)):
        for num_particles in sizes:
            row: Row = {"blocks of noise": blocks, "particles": num_particles}
            for method in ("conditional", "joint"):
                row |= _run(make(num_particles), method, draws=100 if quick else 600)
            rows.append(row)
    return [
        Table(
            "Binary answers of 40 groups, particles from the prior, 8 chains",
            rows,
            "Smallest effective sample size per 1,000 gradients, a density counted as half a "
            "gradient. Where all noise is accepted or rejected at once, joint moves overtake at a "
            "variance of a few; where each group's noise is accepted on its own, only where the "
            "variance is many times that. The kernels' default follows: conditional up to 3, and "
            "up to 20 where the estimate factorises.",
        )
    ]


def _run(model: Callable[..., Any], method: str, *, draws: int) -> Row:
    kernel = PseudoMarginalNUTS(model, method=method, jit_compile=True)
    mcmc = MCMC(kernel, draws, 200, num_chains=8, seed=0, disable_progbar=True)
    mcmc.run(_data())
    stats = mcmc.draws.stats
    draws_made = mcmc.draws.position.numpy()
    cost = float(stats["n_gradients"].double().sum() + 0.5 * stats["n_densities"].double().sum())
    found: Row = {}
    if method == "conditional":
        position = mcmc.draws.position[:, -1]
        values = [
            kernel.potential.value(position, kernel.potential.draw_noise(8)) for _ in range(64)
        ]
        found["variance"] = float(torch.stack(values).var(0).median())
        found["noise renewed"] = float(stats["refresh_rate"].double().mean())
    found[f"{method}, ESS"] = 1000 * smallest_ess(draws_made) / cost
    found[f"{method}, R-hat"] = largest_rhat(draws_made)
    return found


def _data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = 0.5 + torch.randn(_GROUPS, 1, generator=generator)
    return torch.bernoulli(torch.sigmoid(_SLOPE * x).expand(_GROUPS, 4), generator=generator)


def _parameters() -> tuple[Tensor, Tensor]:
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    return mean, pyro.sample("scale", dist.LogNormal(0.0, 0.7))


def _by_hand(num_particles: int) -> Callable[..., Any]:
    def model(y: Tensor) -> None:
        mean, scale = _parameters()
        x = mean + scale * noise("u", (num_particles, _GROUPS))
        terms = dist.Bernoulli(logits=_SLOPE * x[..., None]).log_prob(y).sum(-1)
        pyro.factor("estimate", (terms.logsumexp(0) - math.log(num_particles)).sum())

    return model


def _marginal(num_particles: int) -> Callable[..., Any]:
    def model(y: Tensor) -> None:
        mean, scale = _parameters()
        with pyro.plate("group", _GROUPS, dim=-2):
            x = pyro.sample("x", dist.Normal(mean, scale))
            with pyro.plate("visit", 4, dim=-1):
                pyro.sample("y", dist.Bernoulli(logits=_SLOPE * x), obs=y)

    return marginalize(model, ["x"], num_particles=num_particles, proposal="prior")
