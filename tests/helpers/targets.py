"""Models and densities with known answers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

GLMM_BETA, GLMM_MU = 8, 2


def effects(y: Tensor) -> None:
    """Normal data, an effect for each, about a mean: given that, the data have unit variance."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    with pyro.plate("data", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 0.8))
        pyro.sample("y", dist.Normal(x, 0.6), obs=y)


def glmm_data(
    num_subjects: int = 500, num_visits: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Simulated binary answers of the generalised linear mixed model of the PM-HMC paper."""
    rng = np.random.default_rng(20)
    beta = rng.standard_normal(GLMM_BETA)
    z = rng.standard_normal((num_subjects, num_visits, GLMM_BETA))
    first = rng.random(num_subjects) < 0.8
    narrow = rng.normal(0.0, np.sqrt(1 / 10), num_subjects)
    wide = rng.normal(3.0, np.sqrt(1 / 3), num_subjects)
    x = np.where(first, narrow, wide)
    y = rng.random((num_subjects, num_visits)) < 1 / (1 + np.exp(-(x[:, None] + z @ beta)))
    return torch.tensor(z, dtype=dtype), torch.tensor(y, dtype=dtype)


def glmm(z: Tensor, y: Tensor, spread: float = 3.0) -> None:
    """The generalised linear mixed model, random effects from a mixture of two normals.

    Arguments:
        z: Covariates, of shape ``(subjects, visits, 8)``.
        y: Binary answers, of shape ``(subjects, visits)``.
        spread: Prior standard deviation of log precisions and logit weight.
    """
    zero = z.new_zeros(())
    beta = pyro.sample("beta", dist.Normal(zero, 10.0).expand([GLMM_BETA]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(zero, 10.0).expand([2]).to_event(1))
    log_precision = pyro.sample("log_precision", dist.Normal(zero, spread).expand([2]).to_event(1))
    logit_weight = pyro.sample("logit_weight", dist.Normal(zero, spread))
    effect = dist.MixtureSameFamily(
        dist.Categorical(logits=torch.stack([logit_weight, torch.zeros_like(logit_weight)])),
        dist.Normal(mu, (-0.5 * log_precision).exp()),
    )
    with pyro.plate("subject", z.shape[0], dim=-2):
        x = pyro.sample("x", effect)
        with pyro.plate("visit", z.shape[1], dim=-1):
            pyro.sample("y", dist.Bernoulli(logits=x + z @ beta), obs=y)


def wide_proposal(parameters: dict[str, Any], z: Tensor, y: Tensor, spread: float = 3.0) -> None:
    """The fixed proposal N(0, 9) of the PM-HMC paper."""
    with pyro.plate("subject", z.shape[0], dim=-2):
        pyro.sample("x", dist.Normal(z.new_zeros(()), 3.0))
