"""NumPyro's NUTS: `python -m benchmarks.engine_runs.numpyro_peer`, as :mod:`.told` has it."""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp
import numpyro
import numpyro.distributions

from benchmarks import numpyro_nuts
from benchmarks.engine_runs.told import Run, asked, tell
from benchmarks.numpyro_nuts import numpyro_runs
from benchmarks.posteriors import POSTERIORS, Library


def _told(run: numpyro_nuts.Run) -> Run:
    return Run(run.draws, run.sampling, run.steps)


if __name__ == "__main__":
    told = asked()
    library = Library(numpyro.sample, numpyro.plate, numpyro.distributions, jnp)
    model = partial(POSTERIORS[told.posterior].model, library)
    settings = {"warmup": told.iterations, "draws": told.iterations, "dense": True}
    arguments = tuple(told.data.values())
    run = numpyro_runs(model, arguments, chains=told.chains, **settings)
    tell(told, lambda seed: _told(run(seed)))
