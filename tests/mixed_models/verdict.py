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
    """Compares the unconstrained values of draws, chains first, with a reference's moments."""
    draws = {}
    for name, prior in truth.priors.items():
        free = prior.free(samples[name]).numpy()
        if prior.size == 1:
            draws[name] = free
        else:
            draws |= {f"{name}[{i}]": free[..., i] for i in range(prior.size)}
    data = arviz.convert_to_dataset(draws)
    errors = {method: arviz.mcse(data, method=method) for method in ("mean", "sd")}
    scores: dict[str, dict[str, float]] = {"mean": {}, "sd": {}}
    for i, name in enumerate(reference["names"]):
        for method, moment in (("mean", np.mean), ("sd", np.std)):
            error = np.hypot(float(errors[method][name]), reference[f"{method}_error"][i])
            scores[method][name] = float((moment(draws[name]) - reference[method][i]) / error)
    rhat = max(float(value) for value in arviz.rhat(data).values())
    ess = min(float(value) for value in arviz.ess(data).values())
    return Verdict(scores["mean"], scores["sd"], rhat, ess)
