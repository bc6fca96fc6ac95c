"""Weights with heavy tails: smoothed, and what the error of their mean is."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.arviz_bridge import psislw

_REPEATS = 500  # of a simulated mean
_ALIKE = 1e-9  # difference of log weights, of rounding alone
_COVERAGE = 0.954  # of two standard errors


def smooth_weights(log_weights: Tensor) -> tuple[Tensor, float]:
    """Normalised weights whose tail is smoothed, and the shape k of that tail.

    ArviZ does both. Where nearly all weight is on a handful of draws it finds no tail to fit: k is
    then infinite, and the weights stay as they are; and where all are alike, minus infinity.
    """
    finite = log_weights[log_weights.isfinite()].double()
    if len(finite) < 2:
        count = max(len(log_weights), 1)
        return torch.full_like(log_weights, 1.0 / count, dtype=torch.float64), math.inf
    weights = torch.zeros_like(log_weights, dtype=torch.float64)
    if float(finite.max() - finite.min()) < _ALIKE:
        weights[log_weights.isfinite()] = 1.0 / len(finite)
        return weights, -math.inf
    with np.errstate(all="ignore"):  # many of the largest may be the same
        smoothed, k = psislw((finite - finite.max()).cpu().numpy())
    weights[log_weights.isfinite()] = torch.as_tensor(smoothed).to(weights).softmax(0)
    return weights, float(k)


def mean_error(log_weights: Tensor, smoothed: Tensor, k: float) -> float:
    """Half of what the error of the log mean of weights stays within 95 times in 100.

    It is no less than the standard error of the mean: a weight far beyond the tail that was fitted
    may have a share of the mean that is seldom drawn.

    Arguments:
        log_weights: Their logarithms.
        smoothed: What :func:`smooth_weights` makes of them.
        k: The shape of their tail; where it is no finite number, no tail was found.
    """
    count = len(log_weights)
    relative = (log_weights - log_weights.logsumexp(0)).exp() * count
    standard = float(relative.std()) / math.sqrt(count)
    if not math.isfinite(k):
        return standard
    if k >= 1.0:
        return math.inf
    ordered = np.sort(smoothed.cpu().numpy())
    tail = _tail_length(int(log_weights.isfinite().sum()))
    body, cutoff = ordered[:-tail], ordered[-tail - 1]
    # The scale of the Pareto distribution, from its smoothed quantile in the middle.
    level = (tail // 2 + 0.5) / tail
    scale = k * (ordered[tail // 2 - tail] - cutoff) / ((1.0 - level) ** -k - 1.0)
    generator = np.random.default_rng(0)
    inside = generator.binomial(count, tail / count, _REPEATS)
    excess = scale / k * (generator.random((_REPEATS, inside.max())) ** -k - 1.0)
    excess *= np.arange(inside.max()) < inside[:, None]
    noise = body.std() * np.sqrt(count - inside) * generator.standard_normal(_REPEATS)
    sums = (count - inside) * body.mean() + noise + inside * cutoff + excess.sum(1)
    mean = body.sum() + tail * (cutoff + scale / (1.0 - k))
    return max(standard, 0.5 * float(np.quantile(np.abs(np.log(sums / mean)), _COVERAGE)))


def _tail_length(count: int) -> int:
    """How many of the weights count as their tail."""
    return math.ceil(min(0.2 * count, 3.0 * math.sqrt(count)))
