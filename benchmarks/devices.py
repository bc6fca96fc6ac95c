"""What a graphics card brings: a gradient of all chains, and effective draws per second."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import models
from benchmarks.diagnostics import smallest_ess
from benchmarks.report import Row, Table
from benchmarks.timing import seconds, until_compiled
from pyro_hamflow import MCMC, NUTS, PseudoMarginalHMC
from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.surrogates.costs import synchronize

Rows = list[Row]

ABOUT = "Devices: the CPU beside a graphics card"
_CHAINS = (4, 64, 1024, 8192)
_COMPILED = 1024  # chains
_MOST_NUMBERS = 2**15  # of one draw of all chains, looked at for the effective sample size
_WARMUP, _DRAWS = 150, 100
_LONGEST = 10.0  # seconds of a run; larger ones on that device are left out


class Case(NamedTuple):
    """A posterior, and what samples it."""

    model: Callable[..., Any]
    arguments: tuple[Any, ...]
    kernel: Callable[..., Kernel] = NUTS


def cases(*, quick: bool) -> dict[str, Case]:
    """The posteriors, their data on torch's default device."""
    marginal = models.marginal_glmm("laplace", "iid", 8)
    found = {
        "eight schools": Case(models.schools_noncentred, models.schools_data()),
        "breast cancer, 31 parameters": Case(models.logistic, models.logistic_data()),
        "normal, 100 dimensions": Case(models.correlated, models.correlated_data()),
        "GLMM, effects integrated out": Case(
            marginal, models.glmm_arguments(50 if quick else 500), PseudoMarginalHMC
        ),
    }
    device = torch.get_default_device()
    return {
        name: case._replace(
            arguments=tuple(a.to(device) if isinstance(a, Tensor) else a for a in case.arguments)
        )
        for name, case in found.items()
    }


@contextmanager
def on(device: str) -> Iterator[None]:
    """Has torch make its tensors on a device, on all cores if that is the CPU."""
    threads = torch.get_num_threads()
    torch.set_default_device(device)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_num_threads(threads)


def measure(*, quick: bool) -> list[Table]:
    """Each posterior on each device there is, from few chains to many."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return tables({device: rows_on(device, quick=quick) for device in devices})


def rows_on(device: str, *, quick: bool) -> tuple[Rows, Rows]:
    """Gradients and runs on one device."""
    gradients: Rows = []
    runs: Rows = []
    with on(device):
        for name, case in cases(quick=quick).items():
            gradients += _gradients(name, case, quick=quick)
            runs += _runs(name, case, quick=quick)
    return gradients, runs


def tables(found: Mapping[str, tuple[Rows, Rows]]) -> list[Table]:
    """What was found on each device, beside each other."""
    gradients, runs = (
        _beside({device: parts[i] for device, parts in found.items()}) for i in range(2)
    )
    return [
        Table(
            "A gradient of all chains, in microseconds",
            gradients,
            "Each the median of calls that are waited for: as it was captured, which on a card "
            "launches one kernel for each operation; and compiled, for "
            f"{_COMPILED:,} chains. The CPU uses all its cores.",
        ),
        Table(
            "Effective draws per second",
            runs,
            f"{_WARMUP} iterations of warm-up and {_DRAWS} draws of each chain, with default "
            "settings, nothing compiled. The smallest effective sample size of all coordinates, or "
            "of some where chains are many, by the seconds of the draws. More chains are left out "
            f"on a device whose run took more than {_LONGEST:g} seconds.",
        ),
    ]


def _beside(found: Mapping[str, Rows]) -> Rows:
    """One row for each posterior and number of chains, a column for each device's numbers."""
    cells: dict[tuple[Any, Any], Row] = {}
    for device, rows in found.items():
        for row in rows:
            key = row["posterior"], row["chains"]
            own = {f"{device}: {n}": v for n, v in row.items() if n not in ("posterior", "chains")}
            cells.setdefault(key, {"posterior": key[0], "chains": key[1]}).update(own)
    columns = dict.fromkeys(column for row in cells.values() for column in row)
    names = list(dict.fromkeys(posterior for posterior, _ in cells))
    order = sorted(cells, key=lambda key: (names.index(key[0]), key[1]))
    return [dict.fromkeys(columns, "") | cells[key] for key in order]


def _gradients(name: str, case: Case, *, quick: bool) -> Iterator[Row]:
    model, arguments, _ = case
    if isinstance(model, MarginalModel):
        model.prepare(arguments, {})
    for chains in _CHAINS[: 2 if quick else 4]:
        yield {
            "posterior": name,
            "chains": chains,
            "captured": _gradient(model, arguments, chains, compiled=False),
            "compiled": _gradient(model, arguments, chains, compiled=True)
            if chains == _COMPILED
            else "",
        }


def _gradient(
    model: Callable[..., Any], arguments: tuple[Any, ...], chains: int, *, compiled: bool
) -> float | str:
    """Microseconds of one gradient; nothing where it does not fit the device's memory."""
    torch.manual_seed(0)
    potential = Potential(model, arguments, separate_noise=True, compile_graphs=compiled)
    position, noise = potential.vectors(chains)
    try:
        program = potential.programs.program("gradient", chains)
        until_compiled(program, position, noise)

        def call() -> None:
            program(position, noise)
            synchronize(position)

        call()
        once = seconds(call)[0]
        times = [seconds(call)[0] for _ in range(max(3, min(100, int(0.5 / once))))]
    except torch.OutOfMemoryError:
        return ""
    return 1e6 * statistics.median(times)


def _runs(name: str, case: Case, *, quick: bool) -> Iterator[Row]:
    warmup, draws = (100, 20) if quick else (_WARMUP, _DRAWS)
    for chains in _CHAINS[: 2 if quick else 4]:
        kernel = case.kernel(case.model)
        mcmc = MCMC(kernel, draws, warmup, num_chains=chains, seed=0, disable_progbar=True)
        try:
            took = seconds(lambda: mcmc.run(*case.arguments))[0]  # noqa: B023
        except torch.OutOfMemoryError:
            return
        position = mcmc.draws.position
        step = max(1, chains * position.shape[-1] // _MOST_NUMBERS)
        least = smallest_ess(position[..., ::step].numpy())
        yield {
            "posterior": name,
            "chains": chains,
            "warm-up, s": mcmc.warmup_time,
            "draws, s": mcmc.sampling_time,
            "ESS/s": least / mcmc.sampling_time,
        }
        if took > _LONGEST:
            return
