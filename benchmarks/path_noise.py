"""How much estimates of latent paths vary, by the number of particles."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.path_models import (
    binary,
    bonds,
    classification,
    counts,
    premium,
    simulated,
    steps,
    volatility,
)
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS, marginalize, whiten

ABOUT = "Latent paths: the noise of estimates"
_LOOKS, _PARTICLES = 20, 640  # draws that estimates are looked at, and particles there


def measure(*, quick: bool) -> list[Table]:
    """How much log estimates vary at the posterior's mean, and over its draws."""
    torch.set_default_dtype(torch.float64)
    lengths, places = ((40, 80), (20,)) if quick else ((500, 2000), (100, 500))
    series: list[Any]
    series = [(f"volatility, {n} times", volatility, ["path"], (simulated(n),)) for n in lengths]
    series += [(f"counts, {lengths[0]} times", steps, ["step"], (counts(lengths[0]),))]
    series += [(f"process, {n} places", classification, ["f"], binary(n)) for n in places]
    months = 24 if quick else 240
    series += [(f"term premium, {months} months", premium, ["r", "w"], bonds(months))]
    rows = [_noise(*each) for each in series]
    worst = max(float(row["4, largest"]) for row in rows)
    table = Table(
        "Variance of the log estimate, by the number of particles",
        rows,
        f"At the mean of {_LOOKS} posterior draws, and the median and the largest over them; each "
        f"from {_PARTICLES} particles.",
        f"below one with four particles: {met(worst < 1.0)} ({worst:.2g} at most).",
    )
    return [table]


def _noise(name: str, model: Callable[..., Any], sites: list[str], data: tuple[Tensor, ...]) -> Row:
    mcmc = MCMC(NUTS(whiten(model, sites)), 100, 300, num_chains=2, seed=0, disable_progbar=True)
    mcmc.run(*data)
    every = {n: v[:: 200 // _LOOKS] for n, v in mcmc.get_samples().items() if v[0].numel() == 1}
    mean = {n: v.mean(0) for n, v in every.items()}
    marginal = marginalize(model, sites)
    marginal.fit(*data, pilot=mean)
    draws = [{n: v[i] for n, v in every.items()} for i in range(_LOOKS)]
    row: Row = {"model": name}
    for points, label in (("iid", ""), ("antithetic", " in pairs")):
        at_mean, *others = (_log_weights(marginal, at, data, points) for at in (mean, *draws))
        for number in (1, 4, 16) if points == "iid" else (4,):
            found = torch.tensor([_variance(weights, number) for weights in others])
            row[f"{number}{label}, mean"] = _variance(at_mean, number)
            row[f"{number}{label}, median"] = float(found.median())
            row[f"{number}{label}, largest"] = float(found.max())
    return row


def _log_weights(
    marginal: Any, at: dict[str, Tensor], data: tuple[Tensor, ...], points: str
) -> Tensor:
    """Log weights of many particles, those of a pair side by side."""
    many = marginal.refined(_PARTICLES, points)
    plan = many.plan(*data)
    (group,) = plan.structure.groups
    shape = plan.layouts[group.name].noise_shape(group)
    with torch.no_grad(), many.hold(plan.structure):
        found = many.estimate(group, torch.randn(shape), at, *data).log_weights.flatten()
    weights: Tensor = found.reshape(-1, len(found) // 2).T.flatten()
    return weights if points == "antithetic" else found


def _variance(log_weights: Tensor, number: int) -> float:
    return float(log_weights.reshape(-1, number).logsumexp(-1).var())
