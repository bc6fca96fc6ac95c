"""Runs whose groups of chains move in workers, and workers that are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

from pyro_hamflow import MCMC, NUTS, PseudoMarginalHMC, marginalize
from pyro_hamflow.mcmc import spread
from pyro_hamflow.mcmc.groups import seeds

Y = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)


def model(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("row", 3):
        pyro.sample("y", dist.Normal(mean.sum(), 1.0), obs=y)


def latent(y):
    mean = pyro.sample("mean", dist.Normal(torch.zeros_like(y[0]), 1.0))
    with pyro.plate("row", len(y)):
        x = pyro.sample("x", dist.Normal(mean, 1.0))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)


def marginal():
    return PseudoMarginalHMC(marginalize(latent, ["x"], num_particles=2))


class Inline(Executor):
    """Does at once, in this process, what it is asked for."""

    def submit(self, function, /, *args):
        future = Future()
        future.set_result(function(*args))
        return future


def forked(num_workers=2):
    """Processes whose modules are imported once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pyro_hamflow", "tests.helpers.groups"])
    return ProcessPoolExecutor(num_workers, mp_context=context)


def run(executor, num_samples=24, *, kernel=None, num_chains=3, num_warm=16, data=Y, **settings):
    settings = {"seed": 3, "chains_per_worker": 2, "disable_progbar": True} | settings
    kernel = NUTS(model) if kernel is None else kernel
    mcmc = MCMC(kernel, num_samples, num_warm, num_chains=num_chains, executor=executor, **settings)
    mcmc.run(data)
    return mcmc


@contextmanager
def short_segments(seconds=0.1):
    before, spread.SECONDS = spread.SECONDS, seconds
    try:
        yield
    finally:
        spread.SECONDS = before


def draws_of_groups(num_samples, stop_when=None):
    """The draws of each group, by runs in this process."""
    torch.set_default_dtype(torch.float64)
    settings = {"stop_when": stop_when, "disable_progbar": True}
    parts = []
    for seed, num_chains in zip(seeds(3, 2), (2, 1), strict=True):
        mcmc = MCMC(NUTS(model), num_samples, 16, num_chains=num_chains, seed=seed, **settings)
        mcmc.run(Y)
        parts.append(mcmc.draws.position)
    return torch.cat(parts)


class Killer:
    """Kills the process that it is called in, at one draw: once, or whenever it is that group's."""

    def __init__(self, flag, draw, seed=None, number=signal.SIGKILL):
        self.flag, self.draw, self.seed, self.number = flag, draw, seed, number

    def __call__(self, kernel, params, stage, i):
        if stage == "Sample" and self.seed is not None:
            time.sleep(0.01)  # so that segments end, and draws have come, before it
        if stage != "Sample" or i != self.draw:
            return
        if self.seed is None and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), self.number)
        if self.seed == torch.initial_seed():
            with Path(self.flag).open("a") as file:
                file.write(f"{os.getpid()}\n")
            os.kill(os.getpid(), self.number)
