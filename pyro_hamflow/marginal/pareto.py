"""Pareto-smoothed importance weights, whichever ArviZ there is."""

from __future__ import annotations

import arviz
import numpy as np


def psislw(log_weights: np.ndarray) -> tuple[np.ndarray, float]:
    """Smoothed log weights, and the shape k of their tail."""
    if int(arviz.__version__.split(".")[0]) >= 1:
        from arviz_stats.base import array_stats  # comes with ArviZ 1.0 only

        smoothed, k = array_stats.psislw(-log_weights)  # it is written for log-likelihoods
    else:
        smoothed, k = arviz.psislw(log_weights.copy())
    return np.asarray(smoothed), float(k)
