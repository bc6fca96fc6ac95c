"""flowMC: chains from the prior, Langevin moves and splines, as :mod:`.told` has it.

As its tutorial of two moons has it, with 100 chains, as many global steps as local ones, and the
epochs that its page on settings names; it adapts the steps of local moves.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flowMC.resource_strategy_bundle.RQSpline_MALA import RQSpline_MALA_Bundle
from flowMC.Sampler import Sampler

from benchmarks.mode_runs.told import Asked, asked, tell


def _run(told: Asked) -> None:
    target, quick = told.density, told.quick
    dimension, chains, steps = len(target.prior), 20 if quick else 100, 10 if quick else 100

    def log_density(x: Any, _: Any) -> Any:
        return target.log_prior(jnp, x) + target.log_likelihood(jnp, x)

    made, run = jax.random.split(jax.random.PRNGKey(0))
    bundle = RQSpline_MALA_Bundle(
        made,
        chains,
        dimension,
        log_density,
        n_local_steps=steps,
        n_global_steps=steps,
        n_training_loops=2 if quick else 10,
        n_production_loops=2 if quick else 10,
        n_epochs=5 if quick else 30,
        periodic={place: target.prior[place][1:] for place in target.periodic} or None,
        learning_rate=5e-3,
    )
    settings = {"resource_strategy_bundles": bundle, "outdir": told.folder}
    sampler = Sampler(
        n_dim=dimension, n_chains=chains, rng_key=run, checkpoint_interval=0.0, **settings
    )
    sampler.sample(jnp.asarray(target.draw(chains)), {})
    draws, accepted = (
        np.asarray(sampler.resources[f"{name}_production"].data)
        for name in ("positions", "global_accs")
    )
    tell(told, draws, jumps=float(accepted[np.isfinite(accepted)].mean()))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    _run(asked())
