"""The engines that make NUTS' draws, beside NumPyro: in sampling, and with everything included.

Each sampler runs in a process of its own, which captures and compiles from nothing, or finds on
disk what another has compiled: `python -m benchmarks.engines native "eight schools" 4`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

from benchmarks import competitors, models
from benchmarks.competitors import Run
from benchmarks.nuts import quality
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS

ABOUT = "Engines: NUTS in machine code"
_SAMPLERS = ("native", "native, kept on disk", "torch", "NumPyro")
_GOALS = {"eight schools": 20.0, "breast cancer": 3.0, "normal, 100 dimensions": 3.0}
_CASES: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[[], Any]]] = {
    "eight schools": (models.schools_noncentred, competitors.schools, models.schools_data),
    "breast cancer": (models.logistic, competitors.logistic, models.logistic_data),
    "normal, 100 dimensions": (
        models.correlated,
        competitors.correlated,
        models.correlated_data,
    ),
}


def measure(*, quick: bool) -> list[Table]:
    """Three posteriors, with few chains and with many."""
    rows = [
        _row(name, chains, sampler, folder, quick=quick)
        for name in _CASES
        for chains in ((4,) if quick else (4, 64))
        for folder in [tempfile.mkdtemp()]
        for sampler in _SAMPLERS
    ]
    iterations = 50 if quick else 500
    rate = {(row["posterior"], row["chains"], row["sampler"]): row for row in rows}
    wanted = [
        rate[name, chains, "native"]["ESS/s"] >= goal * rate[name, chains, "NumPyro"]["ESS/s"]
        for name, goal in _GOALS.items()
        for chains in {row["chains"] for row in rows}
    ]
    table = Table(
        "NUTS by its engines",
        rows,
        f"{iterations} iterations of warm-up and as many draws of each chain, a dense mass, one "
        "thread. A leaf is a step of the integrator with its share of the tree. Warm-up counts "
        "capture and compilation, of ours; the first row of each begins with an empty cache.",
        f"in sampling 20 times NumPyro's effective draws per second on eight schools, and three "
        f"times on the others: {met(all(wanted))}.",
    )
    return [table]


def _row(name: str, chains: int, sampler: str, folder: str, *, quick: bool) -> Row:
    environment = os.environ | {"PYRO_HAMFLOW_CACHE": folder, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.engines", sampler, name, str(chains)]
    command += ["quick"] if quick else []
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, env=environment, cwd=root, check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    return {"posterior": name, "chains": chains, "sampler": sampler} | found


def one(sampler: str, name: str, chains: int, iterations: int) -> Row:
    """One sampler on one posterior, in this process, which does nothing else."""
    ours, theirs, data = _CASES[name]
    arguments = data()
    settings = {"chains": chains, "warmup": iterations, "draws": iterations}
    if sampler == "NumPyro":
        plain = tuple(argument.numpy() for argument in arguments)
        run = competitors.numpyro_run(theirs, plain, dense=True, **settings)
    else:
        run = _our_run(ours, arguments, sampler.partition(",")[0], **settings)
    leaves = run.steps * chains * iterations
    return {"us per leaf": 1e6 * run.sampling / leaves} | quality(run)


def _our_run(
    model: Callable[..., Any],
    arguments: tuple[Any, ...],
    engine: str,
    *,
    chains: int,
    warmup: int,
    draws: int,
) -> Run:
    kernel = NUTS(model, full_mass=True, engine=engine, jit_compile=engine == "torch")
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, seed=0, disable_progbar=True)
    mcmc.run(*arguments)
    steps = float(mcmc.draws.stats["n_steps"].double().mean())
    return Run(mcmc.draws.position.numpy(), 0.0, mcmc.warmup_time, mcmc.sampling_time, steps)


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    _, wanted, posterior, count, *rest = sys.argv
    found = one(wanted, posterior, int(count), 50 if rest else 500)
    sys.stdout.write(json.dumps(found) + "\n")
