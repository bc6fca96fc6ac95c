"""NUTS of this package: `python -m benchmarks.engine_runs.ours`, as :mod:`.told` has it."""

from __future__ import annotations

from functools import partial

import pyro
import torch

from benchmarks.engine_runs.told import Asked, Run, asked, tell
from benchmarks.posteriors import POSTERIORS, Library
from pyro_hamflow import MCMC, NUTS


def _run(told: Asked, seed: int) -> Run:
    library = Library(pyro.sample, pyro.plate, pyro.distributions, torch)
    model = partial(POSTERIORS[told.posterior].model, library)
    compiles = told.engine == "torch"
    kernel = NUTS(model, full_mass=True, engine=told.engine, jit_compile=compiles)
    settings = {"num_chains": told.chains, "seed": seed, "disable_progbar": True}
    mcmc = MCMC(kernel, told.iterations, told.iterations, **settings)
    mcmc.run(**{name: torch.as_tensor(part) for name, part in told.data.items()})
    steps = float(mcmc.draws.stats["n_steps"].double().mean())
    return Run(mcmc.draws.position.numpy(), mcmc.sampling_time, steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    told = asked()
    tell(told, partial(_run, told))
