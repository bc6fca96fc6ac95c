"""NumPyro's NUTS, as it is measured beside ours."""

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
import numpy as np
from numpyro.infer import NUTS as NumPyroNUTS

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


def numpyro_run(model: Callable[..., Any] | None, arguments: tuple[Any, ...], **how: Any) -> Run:
    """The first run of :func:`numpyro_runs`."""
    return numpyro_runs(model, arguments, **how)(0)


def numpyro_runs(
    model: Callable[..., Any] | None,
    arguments: tuple[Any, ...],
    *,
    chains: int,
    warmup: int,
    draws: int,
    dense: bool,
    potential: Callable[..., Any] | None = None,
    start: Any = None,
    seed: int = 0,
) -> Callable[[int], Run]:
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
        seed: Of the places where chains start.

    Returns:
        A run by a number: the first has the seed's random numbers; all start at the same places.
    """
    began = time.perf_counter()
    kernel = NumPyroNUTS(model=model, potential_fn=potential, dense_mass=dense)
    keys = jax.random.split(jax.random.PRNGKey(seed), chains)
    first = kernel.init(keys, warmup, start, arguments, {})

    def step(state: Any, _: None) -> tuple[Any, Any]:
        state = kernel.sample(state, arguments, {})
        return state, (state.z, state.num_steps)

    scan = jax.jit(lambda state: jax.lax.scan(step, state, None, length=_BLOCK))
    advance = scan.lower(first).compile()
    preparing = time.perf_counter() - began

    def run(other: int) -> Run:
        state, seconds, kept, steps = first, [0.0, 0.0], [], []
        if other:
            state = state._replace(rng_key=jax.random.split(jax.random.PRNGKey(other), chains))
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

    return run
