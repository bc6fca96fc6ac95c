"""Lynx and hare: the pelts of the Hudson Bay Company, 1900-1920, and the Lotka-Volterra model."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

HARE = (
    30.0, 47.2, 70.2, 77.4, 36.3, 20.6, 18.1, 21.4, 22.0, 25.4, 27.1,
    40.3, 57.0, 76.6, 52.3, 19.5, 11.2, 7.6, 14.6, 16.2, 24.7,
)  # fmt: skip
LYNX = (
    4.0, 6.1, 9.8, 35.2, 59.4, 41.7, 19.0, 13.0, 8.3, 9.1, 7.4,
    8.0, 12.3, 19.5, 45.7, 51.1, 29.7, 15.8, 9.7, 10.1, 8.6,
)  # fmt: skip
_SUBSTEPS = 4  # a year; the log-likelihood is right to 1e-3


def pelts() -> Tensor:
    """Thousands of pelts, of shape ``(21, 2)``: hare, lynx."""
    return torch.tensor([HARE, LYNX], dtype=torch.float64).mT


def populations(start: Tensor, growth: Tensor, meeting: Tensor, years: int) -> Tensor:
    """Logarithms of both populations, year by year, by the classical Runge-Kutta method.

    Their rates of change are a - b exp(lynx) and -c + d exp(hare).

    Arguments:
        start: Logarithms of the populations in the first year.
        growth: a and -c.
        meeting: -b and d.
        years: How many.
    """

    def rate(x: Tensor) -> Tensor:
        return growth + meeting * x.flip(-1).exp()

    step, x, path = 1.0 / _SUBSTEPS, start, [start]
    for _ in range(years - 1):
        for _ in range(_SUBSTEPS):
            k1 = rate(x)
            k2 = rate(x + 0.5 * step * k1)
            k3 = rate(x + 0.5 * step * k2)
            k4 = rate(x + step * k3)
            x = x + step / 6.0 * (k1 + 2.0 * (k2 + k3) + k4)
        path.append(x)
    return torch.stack(path)


def lotka_volterra(y: Tensor) -> None:
    """Eight parameters: growth, meeting, populations of the first year, spread of the counts."""
    sign, one = y.new_tensor([1.0, -1.0]), y.new_ones(2)
    growth = pyro.sample("growth", dist.LogNormal(0.0 * one, 0.5).to_event(1))
    meeting = pyro.sample("meeting", dist.LogNormal((0.05 * one).log(), 0.5).to_event(1))
    start = pyro.sample("start", dist.LogNormal((10.0 * one).log(), 1.0).to_event(1))
    spread = pyro.sample("spread", dist.LogNormal(-one, 1.0).to_event(1))
    path = populations(start.log(), sign * growth, -sign * meeting, len(y))
    pyro.sample("y", dist.LogNormal(path, spread).to_event(2), obs=y)


def lynx_starts(num_chains: int) -> dict[str, Tensor]:
    """Starting values near published estimates: from the prior, half the chains stay in a mode
    whose cycles have another period."""
    near = {
        "growth": (0.55, 0.8),
        "meeting": (0.028, 0.024),
        "start": (33.0, 6.0),
        "spread": (0.25, 0.25),
    }
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.tensor(value, dtype=torch.float64).log()
        + 0.1 * torch.randn(num_chains, 2, generator=generator, dtype=torch.float64)
        for name, value in near.items()
    }
