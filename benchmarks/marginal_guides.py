"""Guides of models whose local sites are integrated out, beside pseudo-marginal NUTS."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

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
    estimator_quality,
    fit_guide,
    importance_sample,
    marginalize,
)
from pyro_hamflow.marginal.marginalize import MarginalModel
from tests.helpers.targets import glmm

ABOUT = "Guides of marginalised models"


def measure(*, quick: bool) -> list[Table]:
    """The mixed model of the PM-HMC paper, and union membership of 545 men."""
    targets = {
        "mixed model, 500 subjects": (
            (glmm, ["x"], glmm_arguments(spread=1.0)),
            {"num_particles": 16, "points": "rqmc"},
        ),
        "union membership, 545 men": (
            (membership, ["effect"], union_data()),
            {"num_particles": 64, "points": "rqmc", "proposal": "prior"},
        ),
    }
    rows = [
        row
        for name, (target, lattice) in targets.items()
        for row in _compare(name, *target, lattice, quick=quick)
    ]
    return [
        Table(
            "Marginal models under pseudo-marginal NUTS and under guides",
            rows,
            "First the estimate that `marginalize` chooses, then one of less noise: a shifted "
            "lattice, and from the prior where the Gaussian approximation of the likelihood fails, "
            "as it does for men who never change membership. The noise is the standard deviation "
            "of 100 log estimates at the posterior mean. Pseudo-marginal NUTS: 4 chains of 500 "
            "draws. Guides: a reverse encoder, 400 steps of 16 draws, 5,000 weights; FlowMH: 20 "
            "chains of 250. All compiled. Gaps are the largest, over all parameters, between means "
            "and those of pseudo-marginal NUTS, in posterior standard deviations, and the same "
            "between standard deviations; NUTS itself is off by one over the root of its ESS. "
            "Seconds include everything but imports and the pilot. The bound is of the estimate: "
            "where it is noisy the guide is drawn to where it is less so, and the noise is part of "
            "the weights besides. Pseudo-marginal NUTS minds neither.",
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
    lattice: dict[str, Any],
    *,
    quick: bool,
) -> list[Row]:
    chosen = marginalize(model, sites)
    chosen.pilot(args, {})
    began = time.perf_counter()
    mcmc = MCMC(
        PseudoMarginalNUTS(chosen, jit_compile=True),
        20 if quick else 500,
        num_chains=4,
        seed=0,
        disable_progbar=True,
    )
    mcmc.run(*args)
    seconds = time.perf_counter() - began
    truth = mcmc.draws.position.flatten(0, 1)
    centre = {site: value.mean(0) for site, value in mcmc.get_samples().items()}

    def rows_of(marginal: MarginalModel, results: list[_Result]) -> list[Row]:
        noise = estimator_quality(marginal, centre, *args).standard_deviation
        count = marginal.plan(*args).layouts[sites[0]].num_particles
        label = f"{marginal.proposal.name}, {count} {marginal.points}"
        return [
            {"model": name, "estimate": label, "its noise": noise} | result.row(truth)
            for result in results
        ]

    ess = _smallest_ess(mcmc)
    equal = torch.ones(len(truth))
    rows = rows_of(chosen, [_Result("pseudo-marginal NUTS", seconds, truth, equal, ess)])
    for marginal in (chosen, marginalize(model, sites, **lattice)):
        marginal.pilot(args, {})
        rows += rows_of(marginal, _guide(marginal, args, quick=quick))
    return rows


class _Result(NamedTuple):
    method: str
    seconds: float
    position: Tensor
    weights: Tensor
    ess: float | None = None
    pareto_k: float | None = None

    def row(self, truth: Tensor) -> Row:
        """The result beside the draws of pseudo-marginal NUTS."""
        mean, sd = truth.mean(0), truth.std(0)
        weights = self.weights[:, None] / self.weights.sum()
        centre = (weights * self.position).sum(0)
        spread = ((weights * self.position.square()).sum(0) - centre.square()).sqrt()
        return {
            "method": self.method,
            "s": self.seconds,
            "gap of means": float(((centre - mean) / sd).abs().max()),
            "gap of sd": float(((spread - sd) / sd).abs().max()),
            "Pareto k": "" if self.pareto_k is None else self.pareto_k,
            "ESS": "" if self.ess is None else self.ess,
        }


def _guide(marginal: MarginalModel, args: tuple[Any, ...], *, quick: bool) -> list[_Result]:
    """A guide by itself, weighted, and as a proposal."""
    torch.manual_seed(0)
    began = time.perf_counter()
    guide = AutoNeuralHamiltonianFlow(marginal, reverse_encoder=True)
    fit_guide(
        marginal,
        guide,
        *args,
        num_steps=20 if quick else 400,
        num_particles=16,
        jit_compile=True,
        seed=0,
        disable_progbar=True,
    )
    trained = time.perf_counter() - began
    draws = 10 if quick else 250
    found = importance_sample(
        marginal, guide, *args, num_samples=20 * draws, seed=1, jit_compile=True
    )
    weighted = time.perf_counter() - began
    began = time.perf_counter()
    kernel = FlowMH(marginal, guide, jit_compile=True)
    chains = MCMC(kernel, draws, 0, num_chains=20, seed=2, disable_progbar=True)
    chains.run(*args)
    seconds = trained + time.perf_counter() - began
    position, smallest = chains.draws.position.flatten(0, 1), _smallest_ess(chains)
    equal = torch.ones(len(position))
    return [
        _Result("guide alone", trained, found.position, equal),
        _Result(
            "guide, weighted", weighted, found.position, found.weights, found.ess, found.pareto_k
        ),
        _Result("FlowMH from the guide", seconds, position, equal, smallest),
    ]


def _smallest_ess(mcmc: MCMC) -> float:
    parts = [part["n_eff"] for part in mcmc.diagnostics().values() if "n_eff" in part]
    return min(float(part.min()) for part in parts)
