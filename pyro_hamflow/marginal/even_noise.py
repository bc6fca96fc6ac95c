"""Noise of a few particles that lie evenly, for a search that has no use for chance."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.model.potential import Potential

_KURTOSIS_FROM = 6  # points: symmetric ones have at most half their number


def even_noise(plan: Plan, potential: Potential) -> Tensor:
    """Noise whose points lie evenly, symmetric about zero.

    The score of an element is nearly linear over its particles where data are many. Independent
    particles miss its mean by far more than a posterior standard deviation then; these do not.
    """
    noise = potential.draw_noise(1)[0]
    sites = {site.name: site for site in potential.noise_sites}
    for group in plan.structure.groups:
        layout, site = plan.layouts[group.name], sites[f"{group.name}_noise"]
        parts = []
        for stratum in layout.strata:
            points = _symmetric_points(stratum.count)
            half, order = stratum.count // 2, []
            for _ in range(layout.dimension):  # Latin, and each point with its opposite
                pick = torch.randperm(half)
                pick = torch.where(torch.rand(half) < 0.5, pick, stratum.count - 1 - pick)
                middle = torch.arange(half, stratum.count - half)
                order.append(torch.cat([pick, middle, stratum.count - 1 - pick]))
            even = points[torch.stack(order, -1)]
            parts.append(even.reshape(-1, *[1] * len(group.shape), layout.dimension))
        shape = layout.noise_shape(group)
        noise[site.start : site.stop] = torch.cat(parts).expand(shape).reshape(-1).to(noise)
    return noise


def _symmetric_points(count: int) -> Tensor:
    """Points of equal weight with the variance and, from six on, the kurtosis of a normal.

    Skewness of an element moves the mean of its score by the fourth moment of the points. That of
    quantiles alone is 2.5 of 16, by which tops were missed by a quarter of a posterior deviation.
    """
    level = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    points = torch.special.ndtri(level)
    if count >= _KURTOSIS_FROM:
        low, high = 0.0, 1.0
        for _ in range(50):
            share = (low + high) / 2
            stretched = points + share * points**3
            moments = stretched.square().mean(), stretched.pow(4).mean()
            low, high = (share, high) if moments[1] < 3 * moments[0] ** 2 else (low, share)
        points = points + low * points**3
    return points / points.square().mean().sqrt().clamp(min=1e-9)
