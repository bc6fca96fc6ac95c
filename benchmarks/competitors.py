"""The samplers that ours are measured against: NumPyro's NUTS and Pyro's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault(  # one thread, as torch has here
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as ndist
import pyro
import torch
from numpyro.infer import NUTS as NumPyroNUTS
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS as PyroNUTS

jax.config.update("jax_enable_x64", True)  # noqa: FBT003
_BLOCK = 50


@dataclass(frozen=True)
class Run:
    """What a sampler did.

    Attributes:
        draws: On the real line, of shape ``(chains, draws, dimension)``.
        preparing: Seconds before warm-up: capture, compilation, starting points.
        warming: Seconds of warm-up.
        sampling: Seconds after it.
        steps: Steps of the integrator per draw, on average over draws and chains.
    """

    draws: np.ndarray
    preparing: float
    warming: float
    sampling: float
    steps: float


def numpyro_run(
    model: Callable[..., Any] | None,
    arguments: tuple[Any, ...],
    *,
    chains: int,
    warmup: int,
    draws: int,
    dense: bool,
    potential: Callable[..., Any] | None = None,
    start: Any = None,
) -> Run:
    """NumPyro's NUTS, all chains vectorised; compiled ahead, in blocks of draws.

    Arguments:
        model: A NumPyro model, unless a potential is given.
        arguments: Of the model.
        chains: How many.
        warmup: Iterations of it, a multiple of 50.
        draws: After it, a multiple of 50.
        dense: Whether the mass is dense.
        potential: An energy of a flat vector.
        start: Where chains start, chains first; found by NumPyro if not given.
    """
    began = time.perf_counter()
    kernel = NumPyroNUTS(model=model, potential_fn=potential, dense_mass=dense)
    keys = jax.random.split(jax.random.PRNGKey(0), chains)
    state = kernel.init(keys, warmup, start, arguments, {})

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state = kernel.sample(state, arguments, {})
        return state, (state.z, state.num_steps)

    scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=_BLOCK))
    advance = scan.lower(state).compile()
    preparing = time.perf_counter() - began
    seconds, kept, steps = [0.0, 0.0], [], []
    for block in range((warmup + draws) // _BLOCK):
        began = time.perf_counter()
        state, (z, num_steps) = jax.block_until_ready(advance(state))
        sampling = block >= warmup // _BLOCK
        seconds[sampling] += time.perf_counter() - began
        if sampling:
            parts = [np.asarray(v).reshape(_BLOCK, chains, -1) for v in jax.tree.leaves(z)]
            kept.append(np.concatenate(parts, -1).swapaxes(0, 1))
            steps.append(np.asarray(num_steps).mean())
    return Run(np.concatenate(kept, 1), preparing, *seconds, float(np.mean(steps)))


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
