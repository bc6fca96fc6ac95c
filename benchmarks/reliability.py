"""What checkpoints cost: time of a run, time to go on, bytes on the disk, memory against draws."""

from __future__ import annotations

import multiprocessing
import tempfile
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.marginal_guides import membership, union_data
from benchmarks.memory import peak_memory
from benchmarks.report import Row, Table, met
from pyro_hamflow import MCMC, NUTS, PseudoMarginalHMC, marginalize
from pyro_hamflow.mcmc.checkpoint import Checkpoints

ABOUT = "Checkpoints: what they cost, and what runs keep"
_GOAL_SHARE = 0.03  # of a run's time
_GOAL_GIB = 1.0
_DRAWS = 10**6


def measure(*, quick: bool) -> list[Table]:
    """Runs of union membership, with its 545 effects, and of the model with the effects sampled."""
    return [_costs(quick=quick), _memory(quick=quick)]


def _kernel(name: str) -> Any:
    if name == "NUTS, 552 parameters":
        return NUTS(membership, max_tree_depth=6)
    return PseudoMarginalHMC(marginalize(membership, ["effect"], num_particles=4), max_num_steps=8)


def _costs(*, quick: bool) -> Table:
    rows = [_cost(name, quick=quick) for name in ("estimated, 545 effects", "NUTS, 552 parameters")]
    worst = max(row["of the run's time"] for row in rows)
    return Table(
        "A run of union membership, 4 chains, a checkpoint every 10 seconds",
        rows,
        "A checkpoint writes all draws since the last and the state, and waits until the disk has "
        "them. Its time is that of one in the run. To start is from nothing to the first "
        "iteration, compiled code and imports aside; to go on, from the files to the next.",
        f"at most {_GOAL_SHARE:.0%} of the time: {met(worst <= _GOAL_SHARE)} ({worst:.2%}).",
    )


class _Spent:
    """How long checkpoints take, of those that hold draws."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._save = Checkpoints.save

    def __enter__(self) -> _Spent:
        def save(checkpoints: Checkpoints, *args: Any, **how: Any) -> None:
            began = time.perf_counter()
            self._save(checkpoints, *args, **how)
            self.seconds.append(time.perf_counter() - began)

        Checkpoints.save = save  # type: ignore[method-assign]
        return self

    def __exit__(self, *reason: object) -> None:
        Checkpoints.save = self._save  # type: ignore[method-assign]


class _Begun(Exception):
    """The first iteration is over."""


def _end(*of_iteration: Any) -> None:
    raise _Begun


def _cost(name: str, *, quick: bool) -> Row:
    lasts, data = (5.0 if quick else 60.0), union_data()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs have not converged
        path = Path(folder) / "run.zarr"
        drawing: list[float] = []

        def over(run: Any) -> bool:
            drawing.append(time.perf_counter())
            return drawing[-1] - drawing[0] > lasts

        began = time.perf_counter()
        MCMC(_kernel(name), 1, 0, num_chains=4, seed=0, disable_progbar=True).run(*data)
        start = time.perf_counter() - began
        mcmc = MCMC(
            _kernel(name),
            num_samples=_DRAWS,
            warmup_steps=50,
            num_chains=4,
            seed=0,
            stop_when=over,
            checkpoint=path,
            checkpoint_every=10.0,
            keep=["effect"],
            disable_progbar=True,
        )
        with _Spent() as spent:
            mcmc.run(*data)
        every = [seconds for seconds in spent.seconds[3:] or spent.seconds]
        draws = mcmc.draws.position.shape[1]
        size = sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())
        again = time.perf_counter()
        try:
            MCMC.resume(path, mcmc.kernel, *data, hook_fn=_end, disable_progbar=True)
        except _Begun:
            pass
        go_on = time.perf_counter() - again
    return {
        "kernel": name,
        "draws of each chain": draws,
        "a checkpoint, ms": 1e3 * float(np.mean(every)),
        "of the run's time": float(np.mean(every)) / 10.0,
        "to start, s": start,
        "to go on, s": go_on,
        "bytes per draw": size / (4 * draws),
        "as numbers": 8 * (mcmc.draws.position.shape[2] + 545 * ("545" in name)),
    }


def _memory(*, quick: bool) -> Table:
    counts = (400, 1_200) if quick else (4_000, 8_000, 16_000)
    rows = []
    for streams in (False, True):
        for count in counts:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as pool:
                peak = pool.submit(peak_of_run, count, streams=streams).result()
            rows.append(
                {"draws of all chains": count, "written": "yes" if streams else "no", "GiB": peak}
            )
    streamed = [row["GiB"] for row in rows if row["written"] == "yes"]
    slope = (streamed[-1] - streamed[0]) / (counts[-1] - counts[0])
    expected = streamed[-1] + slope * (_DRAWS - counts[-1])
    return Table(
        "Peak memory of a process that draws from union membership and keeps its 545 effects",
        rows,
        "In memory, or written every second; 20 chains. The slope, from the smallest to the "
        f"largest, is {slope * 2**30:.3g} bytes per draw where draws are written: positions are "
        "read, and looked at, at the end of a run; effects are not.",
        f"{_DRAWS:,} draws in {_GOAL_GIB:g} GiB, by that slope: {met(expected <= _GOAL_GIB)} "
        f"({expected:.2f}).",
    )


def peak_of_run(draws: int, *, streams: bool) -> float:
    """The peak memory of this process after a run of so many draws of 20 chains, in GiB."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc = MCMC(
            PseudoMarginalHMC(marginalize(membership, ["effect"], num_particles=2), num_steps=1),
            num_samples=draws // 20,
            warmup_steps=10,
            num_chains=20,
            seed=0,
            checkpoint=Path(folder) / "run.zarr" if streams else None,
            checkpoint_every=1.0,
            keep=["effect"],
            disable_progbar=True,
        )
        mcmc.run(*union_data())
    return peak_memory()
