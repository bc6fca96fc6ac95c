"""The two posteriors that everything is measured on, and where chains start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor

from pyro_hamflow import PseudoMarginalHMC, marginalize
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.model.potential import Potential
from tests.helpers.targets import glmm, glmm_data, wide_proposal
from tests.helpers.zoo import SCHOOLS_SIGMA, SCHOOLS_Y

REFERENCE = Path(__file__).parents[1] / "tests" / "reference" / "glmm.json"
PROPOSALS = {"prior": "prior", "laplace": "laplace", "N(0, 9)": wide_proposal}
_SPREAD = 3.0
_STARTS = (1, 4, 7, 10)  # of the reference draws, stratified by the first log precision


def schools_noncentred(sigma: Tensor, y: Tensor) -> None:
    """Eight schools, the effects as multiples of their spread."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("school", 8):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def schools_data() -> tuple[Tensor, Tensor]:
    """Standard errors and estimates."""
    return torch.tensor(SCHOOLS_SIGMA), torch.tensor(SCHOOLS_Y)


def glmm_arguments(num_subjects: int = 500, spread: float = _SPREAD) -> tuple[Any, ...]:
    """Covariates, answers and the spread of the priors."""
    return *glmm_data(num_subjects), spread


def marginal_glmm(proposal: str, points: str, num_particles: int) -> MarginalModel:
    """The GLMM with its random effects integrated out."""
    return marginalize(
        glmm, ["x"], num_particles=num_particles, proposal=PROPOSALS[proposal], points=points
    )


def glmm_reference(spread: float = _SPREAD) -> dict[str, Any]:
    """Posterior means, standard errors and draws from quadrature."""
    return json.loads(REFERENCE.read_text())[f"{spread:g}"]


def glmm_starts(num_chains: int = 4, spread: float = _SPREAD) -> dict[str, Tensor]:
    """Starting values from the posterior, the same for every setting."""
    draws = torch.tensor(glmm_reference(spread)["draws"])
    rows = draws[[_STARTS[chain % len(_STARTS)] for chain in range(num_chains)]]
    return {
        "beta": rows[:, :8],
        "mu": rows[:, 8:10],
        "log_precision": rows[:, 10:12],
        "logit_weight": rows[:, 12],
    }


def glmm_potential(
    num_particles: int, num_subjects: int = 500, *, compile_graphs: bool = False
) -> Potential:
    """The estimated posterior of the GLMM, Laplace proposals fitted near the truth."""
    marginal = marginal_glmm("laplace", "iid", num_particles)
    arguments = glmm_arguments(num_subjects)
    marginal.fit(*arguments, pilot={name: value[0] for name, value in glmm_starts().items()})
    return Potential(marginal, arguments, separate_noise=True, compile_graphs=compile_graphs)


def glmm_kernel(
    proposal: str, points: str, num_particles: int, method: str, **settings: Any
) -> PseudoMarginalHMC:
    """The pseudo-marginal kernel, compiled, with a dense mass unless told otherwise."""
    settings = {"full_mass": True, "jit_compile": True} | settings
    return PseudoMarginalHMC(
        marginal_glmm(proposal, points, num_particles), method=method, **settings
    )


def logistic(x: Tensor, y: Tensor) -> None:
    """Logistic regression with unit normal priors."""
    intercept = pyro.sample("intercept", dist.Normal(0.0, 5.0))
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with pyro.plate("case", len(y)):
        pyro.sample("y", dist.Bernoulli(logits=intercept + x @ slope), obs=y)


def logistic_data() -> tuple[Tensor, Tensor]:
    """Breast cancer: 569 cases, 30 standardised covariates."""
    data = load_breast_cancer()
    x = (data.data - data.data.mean(0)) / data.data.std(0)
    return torch.tensor(x), torch.tensor(data.target, dtype=torch.float64)


def correlated(root: Tensor) -> None:
    """A normal distribution of a hundred dimensions, given by the root of its covariance."""
    zero = root.new_zeros(len(root))
    pyro.sample("x", dist.MultivariateNormal(zero, scale_tril=root))


def correlated_data() -> tuple[Tensor]:
    """A root with condition number of about 60."""
    factor = torch.tensor(np.random.default_rng(0).standard_normal((100, 100)) / 10)
    return (torch.linalg.cholesky(factor @ factor.mT + 0.1 * torch.eye(100)),)


def joint_glmm(z: Tensor, y: Tensor, spread: float) -> None:
    """The GLMM with its random effects as parameters.

    Stock kernels do not take a latent site of mixture type, so that its density is a factor on a
    normal site of density one.
    """
    beta = pyro.sample("beta", dist.Normal(0.0, 10.0).expand([z.shape[-1]]).to_event(1))
    mu = pyro.sample("mu", dist.Normal(0.0, 10.0).expand([2]).to_event(1))
    log_precision = pyro.sample("log_precision", dist.Normal(0.0, spread).expand([2]).to_event(1))
    logit_weight = pyro.sample("logit_weight", dist.Normal(0.0, spread))
    flat = dist.Normal(0.0, 1.0).expand([len(z)]).mask(False)  # noqa: FBT003
    x = pyro.sample("x", flat.to_event(1))
    parts = dist.Normal(mu, (-0.5 * log_precision).exp()).log_prob(x[:, None])
    weights = torch.stack([logit_weight, torch.zeros_like(logit_weight)]).log_softmax(-1)
    pyro.factor("effects", (parts + weights).logsumexp(-1).sum())
    logits = x[:, None] + z @ beta
    pyro.sample("y", dist.Bernoulli(logits=logits).to_event(2), obs=y)
