"""Simulation-based calibration of short stochastic volatilities; see `helpers/calibration.py`."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_hamflow as phf
from pyro_hamflow.marginal.proposals.path import PathProposal
from tests.helpers.calibration import CHAINS, check_uniform, rank

LENGTH, TOGETHER, RUNS = 6, 40, 5
LEVEL, SCALE = dist.Normal(0.0, 1.0), dist.LogNormal(-0.5, 0.4)
PERSISTENCE = 0.8


def volatility(y):
    """Returns of many series, ``(series, times)``, each with parameters of its own."""
    with pyro.plate("series", len(y)):
        level = pyro.sample("level", LEVEL)
        scale = pyro.sample("scale", SCALE)
        x = level
        for t in range(y.shape[1]):
            x = pyro.sample(f"x_{t}", dist.Normal(level + PERSISTENCE * (x - level), scale))
            pyro.sample(f"y_{t}", dist.Normal(0.0, (x / 2).exp()), obs=y[:, t])


def draw_prior():
    level, scale = LEVEL.sample((TOGETHER,)), SCALE.sample((TOGETHER,))
    path = [level + scale * torch.randn(TOGETHER)]
    for _ in range(LENGTH - 1):
        path.append(level + PERSISTENCE * (path[-1] - level) + scale * torch.randn(TOGETHER))
    x = torch.stack(path, -1)
    return level, scale, x, (x / 2).exp() * torch.randn(x.shape)


def quantities(level, scale, x, y):
    fit = dist.Normal(0.0, (x / 2).exp(), validate_args=False).log_prob(y).sum(-1)
    return {"level": level, "scale": scale, "first": x[..., 0], "last": x[..., -1], "fit": fit}


def path_ranks():
    collected = []
    for seed in range(RUNS):
        pyro.set_rng_seed(2000 + seed)
        level, scale, x, y = draw_prior()
        marginal = phf.marginalize(volatility, ["x"], num_particles=2, proposal=PathProposal(1))
        mcmc = phf.MCMC(
            phf.PseudoMarginalNUTS(marginal),
            40,
            60,
            num_chains=CHAINS,
            seed=seed,
            disable_progbar=True,
        )
        mcmc.run(y)
        draws = mcmc.get_samples(group_by_chain=True) | mcmc.draws.local
        last = {name: value[:, -1] for name, value in draws.items()}
        path = torch.stack([last[f"x_{t}"] for t in range(LENGTH)], -1)
        found = quantities(last["level"], last["scale"], path, y)
        collected.append(rank(quantities(level, scale, x, y), found))
    return {name: torch.cat([ranks[name] for ranks in collected]) for name in collected[0]}


@pytest.mark.slow
def test_prior_draws_of_paths_rank_anywhere():
    check_uniform(path_ranks())
