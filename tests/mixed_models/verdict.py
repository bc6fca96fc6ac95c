"""Draws of a mixed model beside its reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import arviz
import numpy as np
from torch import Tensor

from tests.mixed_models.quadrature import Truth


class Verdict(NamedTuple):
    """What a run is worth.

    Attributes:
        mean_scores: By how many standard errors each parameter's mean is off.
        sd_scores: The same of its standard deviation.
        rhat: The largest rank-normalised R-hat.
        ess: The smallest effective sample size, in the bulk.
    """

    mean_scores: dict[str, float]
    sd_scores: dict[str, float]
    rhat: float
    ess: float

    @property
    def worst(self) -> float:
        """The largest score of all."""
        return float(np.abs([*self.mean_scores.values(), *self.sd_scores.values()]).max())


def judge(truth: Truth, samples: Mapping[str, Tensor], reference: Mapping[str, Any]) -> Verdict:
    """Compares the unconstrained values of draws, chains first, with a reference's moments.

    The error of a standard deviation is that of draws with the reference's kurtosis. The draws' own
    would be small where they lack a tail, which is where their standard deviation is too small:
    right draws would be found wrong.
    """
    draws = {}
    for name, prior in truth.priors.items():
        free = prior.free(samples[name]).numpy()
        if prior.size == 1:
            draws[name] = free
        else:
            draws |= {f"{name}[{i}]": free[..., i] for i in range(prior.size)}
    data = arviz.convert_to_dataset(draws)
    mean_errors = arviz.mcse(data)
    mean_scores, sd_scores = {}, {}
    for i, name in enumerate(reference["names"]):
        mean, sd, kurtosis = (reference[moment][i] for moment in ("mean", "sd", "kurtosis"))
        error = np.hypot(float(mean_errors[name]), reference["mean_error"][i])
        mean_scores[name] = float((draws[name].mean() - mean) / error)
        ess = float(arviz.ess((draws[name] - draws[name].mean()) ** 2, method="mean"))
        error = np.hypot(sd * np.sqrt((kurtosis - 1) / 4 / ess), reference["sd_error"][i])
        sd_scores[name] = float((draws[name].std() - sd) / error)
    rhat = max(float(value) for value in arviz.rhat(data).values())
    ess = min(float(value) for value in arviz.ess(data).values())
    return Verdict(mean_scores, sd_scores, rhat, ess)
