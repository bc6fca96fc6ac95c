"""What draws of shape ``(chains, draws, dimension)`` are worth, in their worst dimension."""

from __future__ import annotations

from typing import Any

import arviz
import numpy as np

from tests.helpers.laws import scores


def smallest_ess(draws: np.ndarray) -> float:
    """The smallest effective sample size, in the bulk."""
    return float(arviz.ess(arviz.convert_to_dataset({"v": draws}), method="bulk")["v"].min())


def largest_rhat(draws: np.ndarray) -> float:
    """The largest R-hat."""
    return float(arviz.rhat(arviz.convert_to_dataset({"v": draws}))["v"].max())


def largest_score(draws: np.ndarray, reference: dict[str, Any]) -> float:
    """The largest distance of a mean from a reference, in standard errors."""
    return float(np.abs(scores(draws, reference["mean"], reference["mcse"])).max())
