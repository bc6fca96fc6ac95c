"""Guides of models whose local sites are integrated out, beside pseudo-marginal NUTS."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from linearmodels.datasets import wage_panel
from torch import Tensor

from benchmarks.models import glmm_arguments
from benchmarks.report import Row, Table
from pyro_hamflow import (
    MCMC,
    AutoNeuralHamiltonianFlow,
    FlowMH,
    PseudoMarginalNUTS,
    fit_guide,
    importance_sample,
    marginalize,
)
from tests.targets import glmm

ABOUT = "Guides of marginalised models"


def measure(*, quick: bool) -> list[Table]:
    """The mixed model of the PM-HMC paper, and union membership of 545 men."""
    targets = {
        "mixed model, 500 subjects": (glmm, ["x"], glmm_arguments(spread=1.0)),
        "union membership, 545 men": (membership, ["effect"], union_data()),
    }
    rows = [
        row
        for name, target in targets.items()
        for row in _compare(name, *target, steps=20 if quick else 600, draws=20 if quick else 500)
    ]
    return [
        Table(
            "The same marginal model under pseudo-marginal NUTS and under a guide",
            rows,
            "As many particles as `marginalize` chooses. Pseudo-marginal NUTS: 4 chains of 500 "
            "draws, compiled. The guide: a reverse encoder, 600 steps of 32 draws, 10,000 weights; "
            "FlowMH: 20 chains of 500. Gaps are the largest, over all parameters, between means "
            "and those of pseudo-marginal NUTS, in posterior standard deviations, and the same "
            "between standard deviations. Seconds include everything but imports and the pilot. "
            "The estimate's noise is part of a guide's weights, and more particles make both less "
            "noisy.",
        )
    ]


def membership(covariates: Tensor, union: Tensor) -> None:
    """Union membership, an effect for each man."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 3.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([covariates.shape[-1]]).to_event(1))
    spread = pyro.sample("spread", dist.HalfNormal(3.0))
    with pyro.plate("man", covariates.shape[0], dim=-2):
        effect = pyro.sample("effect", dist.Normal(0.0, spread))
        with pyro.plate("year", covariates.shape[1], dim=-1):
            logits = intercept + covariates @ slope + effect
            pyro.sample("union", dist.Bernoulli(logits=logits), obs=union)


def union_data() -> tuple[Tensor, Tensor]:
    """545 men in eight years: covariates, and whether they are members."""
    panel = wage_panel.load().sort_values(["nr", "year"])
    shape = panel["nr"].nunique(), panel["year"].nunique()
    names = ["educ", "exper", "black", "hisp", "married"]
    scaled = (panel[names] - panel[names].mean()) / panel[names].std()
    covariates = torch.tensor(scaled.to_numpy().reshape(*shape, -1))
    return covariates, torch.tensor(panel["union"].to_numpy(dtype=float).reshape(shape))


def _compare(
    name: str,
    model: Callable[..., Any],
    sites: list[str],
    args: tuple[Any, ...],
    *,
    steps: int,
    draws: int,
) -> list[Row]:
    marginal = marginalize(model, sites)
    marginal.pilot(args, {})  # shared by all
    began = time.perf_counter()
    mcmc = MCMC(
        PseudoMarginalNUTS(marginal, compile=True),
        draws,
        num_chains=4,
        seed=0,
        disable_progbar=True,
    )
    mcmc.run(*args)
    truth = mcmc.draws.position.flatten(0, 1)
    mean, sd = truth.mean(0), truth.std(0)

    def row(label: str, seconds: float, position: Tensor, weights: Tensor, **extra: Any) -> Row:
        weights = weights[:, None] / weights.sum()
        centre = (weights * position).sum(0)
        spread = ((weights * position.square()).sum(0) - centre.square()).sqrt()
        return {
            "model": name,
            "method": label,
            "s": seconds,
            "gap of means": float(((centre - mean) / sd).abs().max()),
            "gap of sd": float(((spread - sd) / sd).abs().max()),
            "Pareto k": "",
            "ESS": "",
        } | extra

    table = mcmc.summary()
    rows = [
        row(
            "pseudo-marginal NUTS",
            time.perf_counter() - began,
            truth,
            torch.ones(len(truth)),
            ESS=float(table["ess_bulk"].min()),
        )
    ]
    torch.manual_seed(0)
    began = time.perf_counter()
    guide = AutoNeuralHamiltonianFlow(marginal, reverse_encoder=True)
    fit_guide(
        marginal,
        guide,
        *args,
        num_steps=steps,
        num_particles=32,
        compile=True,
        seed=0,
        disable_progbar=True,
    )
    trained = time.perf_counter() - began
    found = importance_sample(marginal, guide, *args, num_samples=20 * draws, seed=1)
    seconds = time.perf_counter() - began
    equal = torch.ones(len(found.position))
    rows.append(row("guide alone", trained, found.position, equal))
    corrected = {"Pareto k": found.pareto_k, "ESS": found.ess}
    rows.append(row("guide, weighted", seconds, found.position, found.weights, **corrected))
    began = time.perf_counter()
    chains = MCMC(FlowMH(marginal, guide), draws, 0, num_chains=20, seed=2, disable_progbar=True)
    chains.run(*args)
    seconds = trained + time.perf_counter() - began
    position = chains.draws.position.flatten(0, 1)
    smallest = float(chains.summary()["ess_bulk"].min())
    rows.append(
        row("FlowMH from the guide", seconds, position, torch.ones(len(position)), ESS=smallest)
    )
    return rows
