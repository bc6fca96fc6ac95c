"""How long a gradient takes, against Pyro's own."""

from __future__ import annotations

import statistics

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad

from benchmarks.models import schools_data, schools_noncentred
from benchmarks.report import Row, Table, met
from benchmarks.timing import nothing_compiled, ratio, seconds, side_by_side, until_compiled
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import Program

ABOUT = "Gradients: eight schools, non-centred"
_CHAINS = (1, 16, 64, 1024)
_GOAL_CHAINS, _GOAL_CAPTURED, _GOAL_COMPILED = 64, 10.0, 100.0


def measure(*, quick: bool) -> list[Table]:
    """Gradients of every chain, captured and compiled, and Pyro's, one chain after the other."""
    chains = (1, 64) if quick else _CHAINS
    stock = _stock()
    rows = [_compare(number, stock, quick=quick) for number in chains]
    at = next(row for row in rows if row["chains"] == _GOAL_CHAINS)
    captured, compiled = at["captured, times faster"], at["compiled, times faster"]
    table = Table(
        "A gradient of every chain, in microseconds",
        rows,
        f"At {_GOAL_CHAINS} chains a captured gradient is {captured:.0f} times as fast as Pyro's, "
        f"a compiled one {compiled:.0f} times. Pyro's chains run one after the other, so its time "
        "is that of one chain times their number; by default it validates every distribution, and "
        "the next columns are without that, and with its `jit_compile`. The seconds of capture and "
        "compilation are paid once for each model and number of chains.",
        f"captured at least {_GOAL_CAPTURED:.0f} times as fast at {_GOAL_CHAINS} chains: "
        f"{met(captured >= _GOAL_CAPTURED)} ({captured:.3g}); compiled at least "
        f"{_GOAL_COMPILED:.0f} times: {met(compiled >= _GOAL_COMPILED)} ({compiled:.3g}).",
    )
    return [table]


def _compare(chains: int, stock: dict[str, Program], *, quick: bool) -> Row:
    arguments = schools_data()

    def captured_program() -> tuple[Potential, Program]:
        potential = Potential(schools_noncentred, arguments, compile_graphs=True)
        return potential, potential.graph("gradient", chains)

    capture_time, (potential, captured) = seconds(captured_program)
    inputs = potential.vectors(chains)
    compiled = potential.programs.program("gradient", chains)
    with nothing_compiled():
        compile_time = until_compiled(compiled, *inputs)
    times = side_by_side(
        {
            "captured": lambda: captured(*inputs),
            "compiled": lambda: compiled(*inputs),
            **stock,
        },
        rounds=3 if quick else 15,
        share=0.02 if quick else 0.2,
    )
    pyro_of_all = [chains * time for time in times["Pyro"]]
    micro = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return {
        "chains": chains,
        "captured": micro["captured"],
        "compiled": micro["compiled"],
        "Pyro": chains * micro["Pyro"],
        "Pyro, not validating": chains * micro["Pyro, not validating"],
        "Pyro, jit": chains * micro["Pyro, jit"],
        "captured, times faster": ratio(pyro_of_all, times["captured"]),
        "compiled, times faster": ratio(pyro_of_all, times["compiled"]),
        "capture, s": capture_time,
        "compilation, s": compile_time,
    }


def _stock() -> dict[str, Program]:
    """Pyro's gradient of one chain: as it is, without validation, and with its own compiler."""
    arguments = schools_data()
    _, plain, _, _ = initialize_model(schools_noncentred, arguments)
    _, traced, _, _ = initialize_model(
        schools_noncentred, arguments, jit_compile=True, skip_jit_warnings=True
    )
    point = {"mu": torch.tensor(0.3), "tau": torch.tensor(0.5), "z": 0.1 * torch.arange(8.0)}

    def not_validating() -> None:
        with pyro.validation_enabled(False):
            potential_grad(plain, point)

    return {
        "Pyro": lambda: potential_grad(plain, point),
        "Pyro, not validating": not_validating,
        "Pyro, jit": lambda: potential_grad(traced, point),
    }
