"""What checkpoints cost, how long it takes to go on, memory, and speed against workers."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
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
from pyro_hamflow.mcmc.chains import Chains
from pyro_hamflow.mcmc.checkpoint import Checkpoints

ABOUT = "Checkpoints: what they cost, and what runs keep"
_GOAL_SHARE = 0.03  # of a run's time
_GOAL_GIB = 1.0
_DRAWS = 10**6
_CHAINS = 200  # of which draws come quickest
_BYTES = 8 * (7 + 545)  # of a draw: parameters and effects
_TOGETHER = 4  # chains of a group
_FEWEST = 3  # checkpoints of a run, to tell their cost
_PILOT = 300  # draws that show how long one takes


def measure(*, quick: bool) -> list[Table]:
    """Runs of union membership, with its 545 effects, and of the model with the effects sampled."""
    workers = speed_of_workers((1, 2), groups=2, draws=50 if quick else 2000)
    return [_costs(quick=quick), _memory(quick=quick), workers]


def _kernel(name: str) -> Any:
    if name == "NUTS, 552 parameters":
        return NUTS(membership, max_tree_depth=6)
    return PseudoMarginalHMC(marginalize(membership, ["effect"], num_particles=4), max_num_steps=8)


def _costs(*, quick: bool) -> Table:
    every = 1.0 if quick else 10.0
    rows = [_cost(name, every) for name in ("estimated, 545 effects", "NUTS, 552 parameters")]
    worst = max(row["of the CPU's time"] for row in rows)
    longest = max(row["to go on, s"] / row["to start, s"] for row in rows)
    return Table(
        f"A run of union membership, 4 chains, a checkpoint every {every:g} seconds",
        rows,
        "A checkpoint writes all draws since the last and the state; the disk takes them while the "
        "run goes on. Its time is how long the run waits for one. Its share of the CPU's time is "
        "that of all work for checkpoints, of every thread, between the first and the last of "
        "them; it does not depend on what else the machine does. To start is from nothing to the "
        "end of the first iteration, with the first checkpoint; to go on, from the files to the "
        "end of the next iteration. Either captures the model.",
        f"at most {_GOAL_SHARE:.0%} of the time: {met(worst <= _GOAL_SHARE)} ({worst:.2%}); "
        f"to go on takes no longer than to start: {met(longest <= 1.0)} ({longest:.2f} of it).",
    )


class _Spent:
    """What checkpoints take of a run that is moved by one thread.

    Attributes:
        seconds: How long the run waited for each.
        work: The CPU's time of the run's own thread for each.
        ends: The CPU's time of this process, and of the run's thread, after each.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.work: list[float] = []
        self.ends: list[tuple[float, float]] = []
        self._save = Checkpoints.save

    def __enter__(self) -> _Spent:
        def save(checkpoints: Checkpoints, *args: Any, **how: Any) -> None:
            began, cpu = time.perf_counter(), time.thread_time()
            self._save(checkpoints, *args, **how)
            self.seconds.append(time.perf_counter() - began)
            self.work.append(time.thread_time() - cpu)
            self.ends.append((time.process_time(), time.thread_time()))

        Checkpoints.save = save  # type: ignore[method-assign]
        return self

    def __exit__(self, *reason: object) -> None:
        Checkpoints.save = self._save  # type: ignore[method-assign]

    def share(self) -> float:
        """The share of the CPU's time between the first checkpoint and the last but one."""
        (whole, own), *_, (whole_end, own_end), _ = self.ends
        others = (whole_end - own_end) - (whole - own)
        return (sum(self.work[1:-1]) + others) / (whole_end - whole)


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


def _cost(name: str, every: float) -> Row:
    data = union_data()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # short runs have not converged
        path = Path(folder) / "run.zarr"

        def begin(path: Path, **how: Any) -> MCMC:
            mcmc = MCMC(
                _kernel(name),
                num_samples=_PILOT,
                warmup_steps=50,
                num_chains=4,
                seed=0,
                checkpoint=path,
                checkpoint_every=every,
                keep=["effect"],
                disable_progbar=True,
                **how,
            )
            mcmc.run(*data)
            return mcmc

        def go_on(**how: Any) -> MCMC:
            return MCMC.resume(path, _kernel(name), *data, disable_progbar=True, **how)

        mcmc, spent = begin(path), _Spent()
        draws, each, periods = _PILOT, mcmc.sampling_time / _PILOT, 0.3
        while len(spent.ends) < _FEWEST:  # a short piece first, which tells how long a draw takes
            more, before = max(_PILOT, int(periods * every / each)), mcmc.sampling_time
            with _Spent() as spent:
                mcmc = go_on(num_samples=draws + more)
            draws, each, periods = draws + more, (mcmc.sampling_time - before) / more, 2.7
        size = sum(file.stat().st_size for file in path.rglob("c/**/*") if file.is_file())
        start = _seconds_to_first(partial(begin, Path(folder) / "new.zarr", hook_fn=_end))
        resumed = _seconds_to_first(partial(go_on, num_samples=2 * draws, hook_fn=_end))
    return {
        "kernel": name,
        "draws of each chain": draws,
        "a checkpoint, ms": 1e3 * float(np.mean(spent.seconds[:-1])),
        "of the CPU's time": spent.share(),
        "to start, s": start,
        "to go on, s": resumed,
        "bytes per draw": size / (4 * draws),
        "as numbers": 8 * (mcmc.draws.extent[2] + 545 * ("545" in name)),
    }


def _memory(*, quick: bool) -> Table:
    few, many = (2_000, 4_000) if quick else (20_000, 100_000)
    rows, slopes = [], []
    for count in (few, many):
        with _processes(1) as pool:
            peak, slope = pool.submit(memory_of_run, count).result()
        as_numbers = count * _BYTES / 2**30
        rows.append(
            {"draws of all chains": count, "as numbers, GiB": as_numbers, "at most, GiB": peak}
        )
        slopes.append(slope)
    expected = rows[-1]["at most, GiB"] + max(0.0, slopes[-1]) * (_DRAWS - many)
    return Table(
        "Peak memory of a process that draws from union membership and keeps its 545 effects",
        rows,
        f"Written every second; {_CHAINS} chains. Most of it is the warm-up's. The "
        f"last run's memory grows by {slopes[-1] * 2**30:.3g} bytes a draw over the later half of "
        "its checkpoints; when chunks are full, it does so no more. A few parameters are read at a "
        "time when they are looked at in the end.",
        f"{_DRAWS:,} draws in {_GOAL_GIB:g} GiB, by that growth: {met(expected <= _GOAL_GIB)} "
        f"({expected:.2f}).",
    )


def _processes(count: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def memory_of_run(draws: int) -> tuple[float, float]:
    """The peak memory of this process after a run of so many draws of all chains, in GiB.

    And by how much its memory grew for each draw, over the later half of its checkpoints.
    """
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    seen: list[tuple[int, float]] = []
    save = Checkpoints.save

    def watched(
        checkpoints: Checkpoints, kernel: Any, chains: Chains, *args: Any, **how: Any
    ) -> None:
        save(checkpoints, kernel, chains, *args, **how)
        seen.append((chains.kept.made * _CHAINS, _resident_memory()))

    Checkpoints.save = watched  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mcmc = MCMC(
            PseudoMarginalHMC(
                marginalize(membership, ["effect"], num_particles=2), num_steps=1, engine="native"
            ),
            num_samples=draws // _CHAINS,
            warmup_steps=10,
            num_chains=_CHAINS,
            seed=0,
            checkpoint=Path(folder) / "run.zarr",
            checkpoint_every=1.0,
            keep=["effect"],
            disable_progbar=True,
        )
        mcmc.run(*union_data())
    later = np.array(seen[len(seen) // 2 :])
    slope = float(np.polyfit(*later.T, 1)[0]) if len(later) > 2 else 0.0
    return peak_memory(), slope


def _resident_memory() -> float:
    """Of this process, in GiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def speed_of_workers(counts: Sequence[int], groups: int, draws: int) -> Table:
    """The same groups, moved by more and more processes.

    Arguments:
        counts: How many processes.
        groups: How many groups.
        draws: How many draws each chain makes.
    """
    rows: list[Row] = []
    for count in counts:
        taken = _seconds_of_groups(count, groups, draws)
        rows.append(
            {
                "workers": count,
                "seconds": taken,
                "draws per second": _TOGETHER * groups * draws / taken,
                "against one": rows[0]["seconds"] / taken if rows else 1.0,
            }
        )
    return Table(
        f"Union membership, {_TOGETHER * groups} chains in {groups} groups, by workers",
        rows,
        "Each worker has one thread, and has imported the package; each captures the model for "
        f"itself. This machine has {os.cpu_count()} cores. Beyond, a run is as quick as its "
        "slowest group, there are no more workers at work than groups, and what each captures, "
        "and warm-up, are not divided.",
    )


def _seconds_of_groups(workers: int, groups: int, draws: int) -> float:
    with _processes(workers) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for future in [pool.submit(_ready) for _ in range(2 * workers)]:
            future.result()
        began = time.perf_counter()
        MCMC(
            _kernel("estimated, 545 effects"),
            num_samples=draws,
            warmup_steps=50,
            num_chains=_TOGETHER * groups,
            seed=0,
            executor=pool,
            chains_per_worker=_TOGETHER,
            keep=[],
            disable_progbar=True,
        ).run(*union_data())
        return time.perf_counter() - began


def _ready() -> None:
    time.sleep(0.5)  # so that each worker takes one
