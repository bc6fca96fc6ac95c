"""How much memory a run takes, and how the time of a gradient grows."""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.models import glmm_arguments, glmm_kernel, glmm_potential, glmm_starts
from benchmarks.report import Row, Table, met
from benchmarks.timing import side_by_side
from pyro_hamflow import MCMC

ABOUT = "Memory, and time against size: the GLMM"
_GOAL_GIB = 1.5
_GOAL_SLOPE = 1.1
_BASE = {"particles": 64, "subjects": 500, "chains": 4}
_SWEEPS = {
    "particles": (32, 64, 128, 256),
    "subjects": (125, 250, 500, 1000),
    "chains": (1, 2, 4, 8, 16),
}


def measure(*, quick: bool) -> list[Table]:
    """Peak memory of fresh processes; times and slopes of gradients."""
    return [_memory(quick=quick), _growth(quick=quick)]


def _memory(*, quick: bool) -> Table:
    num_particles = 8 if quick else 128
    rows = []
    for method in ("joint",) if quick else ("joint", "conditional"):
        for compiled in (False, True):
            rows.append(_peak_of_fresh_process(num_particles, method, compiled=compiled))
    worst = max(row["peak, GiB"] for row in rows)
    return Table(
        f"Peak resident memory of a fresh process, N = {num_particles}, 4 chains, a few draws",
        rows,
        f"A run takes {worst:.2f} GiB at most, of which {rows[0]['after imports, GiB']:.2f} are "
        "torch, Pyro and the rest before any model. The last column adds the processes that the "
        "compiler starts, pages that they share counted once.",
        f"at most {_GOAL_GIB} GiB: {met(worst <= _GOAL_GIB)} ({worst:.3g}).",
    )


def _peak_of_fresh_process(num_particles: int, method: str, *, compiled: bool) -> Row:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(few_draws, num_particles, method, compiled=compiled)
        together = 0.0
        while not future.done():
            together = max(together, _share_of(multiprocessing.active_children()[0].pid))
            time.sleep(0.1)
        found = future.result()
    return {
        "method": method,
        "compiled": "yes" if compiled else "no",
        "after imports, GiB": found["imports"],
        "peak, GiB": found["peak"],
        "with the compiler's processes, GiB": max(together, found["peak"]) if together else np.nan,
    }


def few_draws(num_particles: int, method: str, *, compiled: bool) -> Row:
    """Runs a few draws; returns this process's peak memory before and after, in GiB."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    imports = peak_memory()
    kernel = glmm_kernel("laplace", "iid", num_particles, method, jit_compile=compiled)
    mcmc = MCMC(
        kernel,
        num_samples=5,
        warmup_steps=5,
        num_chains=4,
        initial_params=glmm_starts(),
        seed=0,
        disable_progbar=True,
    )
    mcmc.run(*glmm_arguments())
    return {"imports": imports, "peak": peak_memory()}


def peak_memory() -> float:
    """The process's peak resident memory in GiB."""
    status = Path("/proc/self/status")
    if status.exists():  # `ru_maxrss` of a fresh process on Linux starts at its parent's
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _share_of(pid: int | None) -> float:
    """Memory of a process and all that it started, shared pages counted once, in GiB."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        share = int(next(x for x in lines if x.startswith("Pss:")).split()[1]) / 2**20
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text().split()]
    except (OSError, StopIteration):  # it has ended, or the system is another
        return 0.0
    return share + sum(_share_of(child) for child in children)


def _growth(*, quick: bool) -> Table:
    rows, slopes = [], {}
    for size, values in _SWEEPS.items():
        values = values[:2] if quick else values
        times = [_gradient_time(_BASE | {size: value}, quick=quick) for value in values]
        slopes[size] = float(np.polyfit(np.log(values), np.log(times), 1)[0])
        for value, taken in zip(values, times, strict=True):
            rows.append(
                {
                    "varied": size,
                    "value": value,
                    "gradient, ms": 1e3 * taken,
                    "of the first, divided by size": taken / times[0] * values[0] / value,
                    "slope": slopes[size],
                }
            )
    words = ", ".join(f"{slope:.2f} in {size}" for size, slope in slopes.items())
    base = ", ".join(f"{value} {size}" for size, value in _BASE.items())
    worst = max(slopes.values())
    return Table(
        "A gradient in parameters and noise, captured, not compiled",
        rows,
        f"Around {base}, the slopes of log time in log size are {words}: one is linear, less means "
        "that some of the cost does not grow.",
        f"cost linear, slopes at most {_GOAL_SLOPE}: {met(worst <= _GOAL_SLOPE)} ({worst:.3g}).",
    )


def _gradient_time(sizes: dict[str, int], *, quick: bool) -> float:
    potential = glmm_potential(sizes["particles"], sizes["subjects"])
    program: Callable[..., Any] = potential.programs.program("gradients", sizes["chains"])
    inputs = potential.vectors(sizes["chains"])
    times = side_by_side(
        {"gradient": lambda: program(*inputs)}, rounds=3 if quick else 9, share=0.02
    )
    return statistics.median(times["gradient"])
