"""NumPyro's NUTS: `python -m benchmarks.engine_runs.numpyro_peer`, as :mod:`.told` has it."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions

from benchmarks.engine_runs.told import asked, tell
from benchmarks.numpyro_nuts import numpyro_run
from benchmarks.posteriors import POSTERIORS, Library

if __name__ == "__main__":
    told = asked()
    library = Library(numpyro.sample, numpyro.plate, numpyro.distributions, jnp)
    model = partial(POSTERIORS[told.posterior].model, library)
    settings = {"warmup": told.iterations, "draws": told.iterations, "dense": True}
    arguments = tuple(told.data.values())
    run = numpyro_run(model, arguments, chains=told.chains, **settings)
    tell(told, run.draws, run.sampling, run.steps)
