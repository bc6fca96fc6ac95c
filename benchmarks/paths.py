"""Latent paths integrated out or whitened, beside NumPyro's joint NUTS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import arviz
import jax.numpy as jnp
import torch
from torch import Tensor

from benchmarks.competitors import numpyro_run
from benchmarks.memory import peak_memory
from benchmarks.path_models import (
    binary,
    classification,
    joint_classification,
    joint_volatility,
    simulated,
    stocks,
    volatility,
)
from benchmarks.report import Row, Table, met
from pyro_hamflow import HNNNUTS, MCMC, NUTS, PseudoMarginalNUTS, marginalize, whiten
from pyro_hamflow.model.potential import Potential

ABOUT = "Latent paths: stochastic volatility, and a Gaussian process"
_CHAINS, _DRAWS, _WARMUP = 4, 300, 300
# Times the better joint sampler's effective draws per second: of the longest series, and of a
# process at a hundred places.
_WANTED = {"simulated": 15.0, "S&P 500": 5.0, "Gaussian process": 10.0}
_LONGEST, _MEMORY = 20_000, 2048  # times, and MiB for four chains of them
_NUMPYRO, _LEARNED = "joint NUTS, NumPyro", "marginalize, HNNNUTS"
# Of the longest series, which have a reach, effective draws are the mean of so many seeds.
_SEEDS, _MANY_SEEDS = 3, ("auto", "HNNNUTS", "standard noise")
_MIXED = 1.03  # R-hat of chains whose effective draws are taken for what they are
_NOTE = (
    f"Four chains of {_DRAWS} draws after {_WARMUP}. ESS is the smallest of the parameters, in the "
    "bulk; seconds are of the clock, one thread, sampling alone, and with all that comes before."
)


def measure(*, quick: bool) -> Iterator[Table]:
    """Effective draws per second of each sampler, and what an estimate costs by length.

    A table comes whenever a row of it is finished: a run of half an hour that is cut keeps them.
    """
    torch.set_default_dtype(torch.float64)
    lengths = (100,) if quick else (500, 2000)
    yield from speed("simulated", lengths)
    yield from speed("S&P 500", lengths)
    yield from process(30 if quick else 100)
    yield cost((100, 200) if quick else (500, 2000, 8000, _LONGEST))
    yield memory(200 if quick else _LONGEST)


def speed(name: str, lengths: tuple[int, ...]) -> Iterator[Table]:
    """Stochastic volatility of one kind of data, with more rows each time."""
    rows: list[Row] = []
    table = Table(
        f"Stochastic volatility, {name}",
        rows,
        f"{_NOTE} Joint samplers have the path among their parameters, centred or as noise. "
        f"{_LEARNED} follows a network in machine code, judged by estimates of four particles in "
        f"pairs. Of the longest series {', '.join(_MANY_SEEDS)} are the mean of {_SEEDS} seeds, "
        "and R-hat is the largest.",
    )
    for length in lengths:
        y = (simulated if name == "simulated" else stocks)(length)
        if y is not None:
            joint = partial(_volatility_of_numpyro, y)
            seeds = _SEEDS if length == lengths[-1] else 1
            names = ("mean", "phi", "scale")
            for row in _beside(volatility, "path", names, (y,), joint, seeds=seeds):
                rows.append({"length": length} | row)
                yield table
    if rows:
        times = _times([row for row in rows if row["length"] == lengths[-1]])
        yield replace(table, reach=_reach(name, f"T = {lengths[-1]}", times))


def process(count: int) -> Iterator[Table]:
    """Binary data of a latent Gaussian process, with more rows each time."""
    x, y = binary(count)
    joint = {"standard noise": partial(_process_of_numpyro, x, y)}
    rows: list[Row] = []
    table = Table(f"Gaussian process classification, {count} places", rows, _NOTE)
    for row in _beside(classification, "f", ("length", "size"), (x, y), lambda: joint):
        rows.append(row)
        yield table
    yield replace(table, reach=_reach("Gaussian process", f"{count} places", _times(rows)))


def _reach(name: str, where: str, times: float) -> str:
    wanted = _WANTED[name]
    return (
        f"{name}, {where}: at least {wanted:.0f} times the best joint sampler's effective draws "
        f"per second: {met(times >= wanted)} ({times:.1f})."
    )


def _times(rows: list[Row]) -> float:
    mixed = [row for row in rows if row["R-hat"] < _MIXED]
    best = {
        theirs: max(
            float(row["ESS per second"])
            for row in (mixed or rows)
            if row["sampler"].startswith(_NUMPYRO) is theirs
        )
        for theirs in (False, True)
    }
    return best[False] / best[True]


class Found(NamedTuple):
    """What one run has found: its parameters, seconds of drawing and of all, a variance."""

    parts: list[Any]
    sampling: float
    total: float
    variance: float | str = ""


def _beside(
    model: Callable[..., Any],
    site: str,
    names: tuple[str, ...],
    data: tuple[Tensor, ...],
    joint: Callable[[], dict[str, Callable[[int], Found]]],
    *,
    seeds: int = 1,
) -> Iterator[Row]:
    """Ours, then NumPyro's."""
    kernels: dict[str, Callable[[], Any]] = {
        f"marginalize, {method}": partial(_pseudo_marginal, method, model, site)
        for method in ("auto", "conditional", "joint")
    }
    kernels |= {_LEARNED: partial(_learned, model, site)}
    kernels |= {"whiten": lambda: NUTS(whiten(model, [site]))}
    samplers = {name: partial(_ours, made, names, data) for name, made in kernels.items()}
    samplers |= {f"{_NUMPYRO}, {way}": run for way, run in joint().items()}
    for sampler, run in samplers.items():
        some = range(seeds if sampler.endswith(_MANY_SEEDS) else 1)
        yield {"sampler": sampler} | _row([run(seed) for seed in some])


def _pseudo_marginal(method: str, model: Callable[..., Any], site: str) -> Any:
    return PseudoMarginalNUTS(marginalize(model, [site]), method=method)


def _learned(model: Callable[..., Any], site: str) -> Any:
    marginal = marginalize(model, [site], num_particles=4, points="antithetic")
    return HNNNUTS(marginal, engine="native", fallback=False)


def _ours(
    make: Callable[[], Any], names: tuple[str, ...], data: tuple[Tensor, ...], seed: int
) -> Found:
    kernel = make()
    began = time.perf_counter()
    mcmc = MCMC(kernel, _DRAWS, _WARMUP, num_chains=_CHAINS, seed=seed, disable_progbar=True)
    mcmc.run(*data)
    total = time.perf_counter() - began
    draws = mcmc.get_samples(group_by_chain=True)
    variance = kernel.settings.get("log_likelihood_variance", "")
    return Found([draws[name].numpy() for name in names], mcmc.sampling_time, total, variance)


def _volatility_of_numpyro(y: Tensor) -> dict[str, Callable[[int], Found]]:
    def run(seed: int, *, centred: bool) -> Found:
        # Leaves are in the order of names: mean, path, phi, scale.
        return _numpyro(partial(joint_volatility, centred=centred), (y,), (0, -2, -1), seed)

    return {
        "centred": partial(run, centred=True),
        "standard noise": partial(run, centred=False),
    }


def _process_of_numpyro(x: Tensor, y: Tensor, seed: int) -> Found:
    return _numpyro(joint_classification, (x, y), (-2, -1), seed)  # f, length, size


def _numpyro(model: Any, data: tuple[Tensor, ...], kept: tuple[int, ...], seed: int) -> Found:
    plain = tuple(jnp.asarray(values.numpy()) for values in data)
    run = numpyro_run(
        model, plain, chains=_CHAINS, warmup=_WARMUP, draws=_DRAWS, dense=False, seed=seed
    )
    total = run.preparing + run.warming + run.sampling
    return Found([run.draws[..., i] for i in kept], run.sampling, total)


def _row(runs: list[Found]) -> Row:
    smallest = [min(float(arviz.ess(part)) for part in run.parts) for run in runs]
    return {
        "smallest ESS": sum(smallest) / len(runs),
        "R-hat": max(float(arviz.rhat(part)) for run in runs for part in run.parts),
        "ESS per second": sum(smallest) / sum(run.sampling for run in runs),
        "with warm-up": sum(smallest) / sum(run.total for run in runs),
        "variance": runs[-1].variance,
    }


def cost(lengths: tuple[int, ...]) -> Table:
    """One gradient, by length."""
    rows = [_cost(length) for length in lengths]
    growth = rows[-1]["ms"] / rows[0]["ms"] / (rows[-1]["length"] / rows[0]["length"])
    return Table(
        "One gradient of four chains, by length",
        rows,
        "Of the estimate with one particle, the Gaussian path's factors and their gradients "
        "included; by torch, not compiled.",
        f"cost grows no faster than length: {met(growth <= 1.0)} ({growth:.2f} of it).",
    )


def _cost(length: int) -> Row:
    y = simulated(length)
    marginal = marginalize(volatility, ["path"], num_particles=1)
    values = {"mean": -0.5, "phi": 0.985, "scale": 0.2}
    marginal.fit(y, pilot={name: torch.tensor(value) for name, value in values.items()})
    potential = Potential(marginal, (y,), separate_noise=True)
    position, noise = potential.vectors(_CHAINS)
    potential.gradients(position, noise)
    began, calls = time.process_time(), 10
    for _ in range(calls):
        potential.gradients(position, noise)
    return {"length": length, "ms": 1e3 * (time.process_time() - began) / calls}


def memory(length: int) -> Table:
    """A run by all defaults but its length, in a process that does nothing else."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.paths", str(length)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        check=True,
        capture_output=True,
        text=True,
    )
    row: Row = json.loads(done.stdout.splitlines()[-1])
    return Table(
        f"Memory of four chains, T = {length}",
        [row],
        "The most that the process took, of 20 draws of the parameters and of whole paths after 30 "
        "iterations of warm-up; the path is integrated out.",
        f"at most {_MEMORY} MiB: {met(row['MiB'] <= _MEMORY)} ({row['MiB']:.0f}).",
    )


def _run_long(length: int) -> Row:
    kernel = PseudoMarginalNUTS(marginalize(volatility, ["path"]))
    mcmc = MCMC(kernel, 20, 30, num_chains=_CHAINS, seed=0, disable_progbar=True)
    mcmc.run(simulated(length))
    return {"length": length, "MiB": 1024 * peak_memory(), "sampling, s": mcmc.sampling_time}


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    sys.stdout.write(json.dumps(_run_long(int(sys.argv[1]))) + "\n")
