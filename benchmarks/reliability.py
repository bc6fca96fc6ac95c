"""What checkpoints cost, how long it takes to go on, memory, and speed against workers."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
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
_EVERY = 10.0  # seconds between checkpoints
_CHAINS = 200  # of which draws come quickest


def measure(*, quick: bool) -> list[Table]:
    """Runs of union membership, with its 545 effects, and of the model with the effects sampled."""
    return [_costs(quick=quick), _memory(quick=quick), _workers(quick=quick)]


def _kernel(name: str) -> Any:
    if name == "NUTS, 552 parameters":
        return NUTS(membership, max_tree_depth=6)
    return PseudoMarginalHMC(marginalize(membership, ["effect"], num_particles=4), max_num_steps=8)


def _costs(*, quick: bool) -> Table:
    rows = [_cost(name, quick=quick) for name in ("estimated, 545 effects", "NUTS, 552 parameters")]
    worst = max(row["of the CPU's time"] for row in rows)
    longest = max(row["to go on, s"] / row["to start, s"] for row in rows)
    return Table(
        f"A run of union membership, 4 chains, a checkpoint every {_EVERY:g} seconds",
        rows,
        "A checkpoint writes all draws since the last and the state, and waits until the disk has "
        "them. Its time is that of one in the run. Of the CPU's time, it is the share of all of "
        "them in that of drawing, which does not depend on what else the machine does. To start is "
        "from nothing to the end of the first iteration, with the first checkpoint; to go on, from "
        "the files to the end of the next iteration. Either captures the model.",
        f"at most {_GOAL_SHARE:.0%} of the time: {met(worst <= _GOAL_SHARE)} ({worst:.2%}); "
        f"to go on takes no longer than to start: {met(longest <= 1.0)} ({longest:.2f} of it).",
    )


class _Spent:
    """How long checkpoints take, by the clock and of the CPU's time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu: list[float] = []
        self._save = Checkpoints.save

    def __enter__(self) -> _Spent:
        def save(checkpoints: Checkpoints, *args: Any, **how: Any) -> None:
            began, cpu = time.perf_counter(), time.process_time()
            self._save(checkpoints, *args, **how)
            self.seconds.append(time.perf_counter() - began)
            self.cpu.append(time.process_time() - cpu)

        Checkpoints.save = save  # type: ignore[method-assign]
        return self

    def __exit__(self, *reason: object) -> None:
        Checkpoints.save = self._save  # type: ignore[method-assign]


class _Begun(Exception):
    """The first iteration is over."""


def _end(*of_iteration: Any) -> None:
    raise _Begun(time.perf_counter())


def _seconds_to_first(begin: Callable[[], Any]) -> float:
    """How long it takes to the end of the first iteration."""
    began = time.perf_counter()
    try:
        begin()
    except _Begun as over:
        return float(over.args[0]) - began
    raise RuntimeError("there was no iteration")


def _cost(name: str, *, quick: bool) -> Row:
    lasts, data = (5.0 if quick else 35.0), union_data()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs have not converged
        path = Path(folder) / "run.zarr"
        drawing: list[float] = []
        cpu: list[float] = []

        def over(run: Any) -> bool:
            drawing.append(time.perf_counter())
            cpu.append(time.process_time())
            return drawing[-1] - drawing[0] > lasts

        def run(path: Path, **how: Any) -> MCMC:
            mcmc = MCMC(
                _kernel(name),
                num_samples=_DRAWS,
                warmup_steps=50,
                num_chains=4,
                seed=0,
                checkpoint=path,
                checkpoint_every=_EVERY,
                keep=["effect"],
                disable_progbar=True,
                **how,
            )
            mcmc.run(*data)
            return mcmc

        with _Spent() as spent:
            mcmc = run(path, stop_when=over)
        every = spent.seconds[2:-1] or spent.seconds
        share = sum(spent.cpu[2:-1]) / (cpu[-1] - cpu[0])
        draws = mcmc.draws.extent[1]
        size = sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())
        start = _seconds_to_first(partial(run, Path(folder) / "new.zarr", hook_fn=_end))
        again = partial(MCMC.resume, path, _kernel(name), *data, hook_fn=_end, disable_progbar=True)
        go_on = _seconds_to_first(again)
    return {
        "kernel": name,
        "draws of each chain": draws,
        "a checkpoint, ms": 1e3 * float(np.mean(every)),
        "of the CPU's time": share,
        "to start, s": start,
        "to go on, s": go_on,
        "bytes per draw": size / (4 * draws),
        "as numbers": 8 * (mcmc.draws.extent[2] + 545 * ("545" in name)),
    }


def _memory(*, quick: bool) -> Table:
    counts = {False: (2_000, 10_000), True: (2_000, 10_000) if quick else (2_000, 20_000)}
    rows = []
    for streams in (False, True):
        for count in counts[streams]:
            with _processes(1) as pool:
                peak = pool.submit(peak_of_run, count, streams=streams).result()
            rows.append(
                {"draws of all chains": count, "written": "yes" if streams else "no", "GiB": peak}
            )
    streamed = [row["GiB"] for row in rows if row["written"] == "yes"]
    slope = max(0.0, (streamed[-1] - streamed[0]) / (counts[True][-1] - counts[True][0]))
    expected = max(streamed) + slope * (_DRAWS - counts[True][-1])
    return Table(
        "Peak memory of a process that draws from union membership and keeps its 545 effects",
        rows,
        f"In memory, or written every second; {_CHAINS} chains. The slope, from the smallest to "
        f"the largest, is {slope * 2**30:.3g} bytes per draw where draws are written: a few "
        "parameters are read at a time when they are looked at in the end.",
        f"{_DRAWS:,} draws in {_GOAL_GIB:g} GiB, by that slope: {met(expected <= _GOAL_GIB)} "
        f"({expected:.2f}).",
    )


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def peak_of_run(draws: int, *, streams: bool) -> float:
    """The peak memory of this process after a run of so many draws of all chains, in GiB."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc = MCMC(
            PseudoMarginalHMC(marginalize(membership, ["effect"], num_particles=2), num_steps=1),
            num_samples=draws // _CHAINS,
            warmup_steps=10,
            num_chains=_CHAINS,
            seed=0,
            checkpoint=Path(folder) / "run.zarr" if streams else None,
            checkpoint_every=1.0,
            keep=["effect"],
            disable_progbar=True,
        )
        mcmc.run(*union_data())
    return peak_memory()


def _workers(*, quick: bool) -> Table:
    """The same groups, moved by one process and by two."""
    draws = 100 if quick else 400
    rows: list[Row] = []
    for count in (1, 2):
        with _processes(count) as pool, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for future in [pool.submit(_ready) for _ in range(2 * count)]:
                future.result()
            began = time.perf_counter()
            MCMC(
                _kernel("estimated, 545 effects"),
                num_samples=draws,
                warmup_steps=50,
                num_chains=8,
                seed=0,
                executor=pool,
                chains_per_worker=4,
                disable_progbar=True,
            ).run(*union_data())
            seconds = time.perf_counter() - began
        rows.append(
            {
                "workers": count,
                "seconds": seconds,
                "draws per second": 8 * draws / seconds,
                "against one": rows[0]["seconds"] / seconds if rows else 1.0,
            }
        )
    return Table(
        "Union membership, 8 chains in 2 groups, by the number of workers",
        rows,
        "Each worker has one thread, and has imported the package; each captures the model for "
        f"itself. This machine has {os.cpu_count()} cores. Beyond, a run is as quick as its "
        "slowest group, and there are no more workers at work than groups.",
    )


def _ready() -> None:
    time.sleep(0.5)  # so that each worker takes one
