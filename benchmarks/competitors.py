"""The samplers that ours are measured against: NumPyro's NUTS and Pyro's."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS

from benchmarks.numpyro_nuts import Run, numpyro_run

__all__ = ["Run", "correlated", "joint_glmm", "logistic", "numpyro_run", "pyro_run", "schools"]


def pyro_run(
    model: Callable[..., Any], arguments: tuple[Any, ...], *, warmup: int, draws: int, dense: bool
) -> Run:
    """Pyro's NUTS, one chain; several run one after the other, or each on a core of its own."""
    times: list[float] = []
    kernel = PyroNUTS(model, full_mass=dense)
    mcmc = PyroMCMC(
        kernel,
        num_samples=draws,
        warmup_steps=warmup,
        disable_progbar=True,
        hook_fn=lambda *_: times.append(time.perf_counter()),
    )
    began = time.perf_counter()
    with pyro.validation_enabled(False):
        mcmc.run(*arguments)
    free = {
        name: kernel.transforms[name](value) if name in kernel.transforms else value
        for name, value in mcmc.get_samples().items()
    }
    flat = torch.cat([free[name].reshape(draws, -1) for name in sorted(free)], -1)
    return Run(
        flat[None].numpy(), 0.0, times[warmup - 1] - began, times[-1] - times[warmup - 1], np.nan
    )


# --- the same models for NumPyro ----------------------------------------------------------------


def schools(sigma: Any, y: Any) -> None:
    """Eight schools, non-centred."""
    mu = numpyro.sample("mu", ndist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", ndist.HalfCauchy(5.0))
    with numpyro.plate("school", 8):
        z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
        numpyro.sample("y", ndist.Normal(mu + tau * z, sigma), obs=y)


def logistic(x: Any, y: Any) -> None:
    """Logistic regression."""
    intercept = numpyro.sample("intercept", ndist.Normal(0.0, 5.0))
    slope = numpyro.sample("slope", ndist.Normal(0.0, 1.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("case", len(y)):
        numpyro.sample("y", ndist.Bernoulli(logits=intercept + x @ slope), obs=y)


def correlated(root: Any) -> None:
    """A correlated normal distribution."""
    zero = jnp.zeros(len(root))
    numpyro.sample("x", ndist.MultivariateNormal(zero, scale_tril=root))


def joint_glmm(z: Any, y: Any, spread: float) -> None:
    """The GLMM with its random effects as parameters."""
    beta = numpyro.sample("beta", ndist.Normal(0.0, 10.0).expand([z.shape[-1]]).to_event(1))
    mu = numpyro.sample("mu", ndist.Normal(0.0, 10.0).expand([2]).to_event(1))
    log_precision = numpyro.sample(
        "log_precision", ndist.Normal(0.0, spread).expand([2]).to_event(1)
    )
    logit_weight = numpyro.sample("logit_weight", ndist.Normal(0.0, spread))
    weights = jax.nn.log_softmax(jnp.stack([logit_weight, jnp.zeros_like(logit_weight)]))
    effect = ndist.MixtureSameFamily(
        ndist.Categorical(logits=weights), ndist.Normal(mu, jnp.exp(-0.5 * log_precision))
    )
    x = numpyro.sample("x", effect.expand([z.shape[0]]).to_event(1))
    numpyro.sample("y", ndist.Bernoulli(logits=x[:, None] + z @ beta).to_event(2), obs=y)
