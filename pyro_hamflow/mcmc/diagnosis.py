"""R-hat and effective sample sizes of a run's coordinates, of the worst where there are many.

Draws are looked at so many, or a few coordinates of all, at a time: they need not be in memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow import arviz_bridge
from pyro_hamflow.mcmc.draws import Draws

_MOST = 40  # parameters that are looked at closely for each of two screens
_AT_ONCE = 2**22  # numbers that are read and judged together


def worst(draws: Draws) -> list[int]:
    """Indices of the coordinates to look at: all if they are few, else the worst of two screens.

    The screens are cheap: how far the halves of chains lie apart, and how alike successive draws
    are. Each names forty.
    """
    dimension = draws.extent[2]
    if dimension <= 2 * _MOST:
        return list(range(dimension))
    screens = (screen.nan_to_num(nan=torch.inf) for screen in _screens(draws))
    return torch.cat([screen.topk(_MOST).indices for screen in screens]).unique().tolist()


def _screens(draws: Draws) -> tuple[Tensor, Tensor]:
    """Both screens of each coordinate, in two passes through the draws."""
    chains, length, dimension = draws.extent
    half = length // 2

    def halves(first: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        return rows[:, : max(0, half - first)], rows[:, max(0, length - half - first) :]

    total = torch.zeros(chains, dimension, dtype=torch.float64)
    means = torch.zeros(2, chains, dimension, dtype=torch.float64)
    for first, rows in draws.stretches():
        total += rows.double().sum(1)
        means += torch.stack([part.double().sum(1) for part in halves(first, rows)])
    total, means = total / length, means / half
    squares = torch.zeros_like(means)
    products = torch.zeros(2, dimension, dtype=torch.float64)
    last = torch.zeros(chains, 0, dimension, dtype=torch.float64)
    for first, rows in draws.stretches():
        parts = zip(halves(first, rows), means, strict=True)
        squares += torch.stack([(part - mean[:, None]).square().sum(1) for part, mean in parts])
        centred = torch.cat([last, rows - total[:, None]], 1)
        products[0] += (centred[:, 1:] * centred[:, :-1]).sum((0, 1))
        products[1] += centred[:, last.shape[1] :].square().sum((0, 1))
        last = centred[:, -1:]
    apart = means.flatten(0, 1).var(0) / (squares / (half - 1)).mean((0, 1))
    return apart, products[0] / products[1]


def judged(draws: Draws, columns: Sequence[int]) -> dict[str, np.ndarray]:
    """R-hat and effective sample sizes of some coordinates, by ArviZ.

    R-hat of what never moved is infinite. A few coordinates are read at a time.
    """
    chains, length, _ = draws.extent
    at_once = max(1, _AT_ONCE // (chains * length))
    parts = [
        _judge(draws.columns(list(columns[first : first + at_once])).double().numpy())
        for first in range(0, len(columns), at_once)
    ]
    return {kind: np.concatenate([part[kind] for part in parts]) for kind in parts[0]}


def _judge(rows: np.ndarray) -> dict[str, np.ndarray]:
    """The same of draws ``(chains, draws, coordinates)``."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):  # chains that never moved
        warnings.simplefilter("ignore")
        found = {
            "rhat": arviz_bridge.rhat(halved(rows)),
            "ess_bulk": arviz_bridge.ess(rows),
            "ess_tail": arviz_bridge.ess(rows, "tail"),
        }
    moved = (np.ptp(rows, 1) > 0.0).any(0)
    found["rhat"] = np.where(moved & np.isfinite(found["rhat"]), found["rhat"], np.inf)
    return found


def halved(rows: np.ndarray) -> np.ndarray:
    """The chains, of shape ``(chains, draws, *)``; of a single one, its halves."""
    if len(rows) > 1:
        return rows
    half = rows.shape[1] // 2
    return rows[0, : 2 * half].reshape(2, half, *rows.shape[2:])
