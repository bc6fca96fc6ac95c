"""What a kernel adds to the gradients that it evaluates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import (
    glmm_arguments,
    glmm_starts,
    marginal_glmm,
    schools_data,
    schools_noncentred,
)
from benchmarks.report import Row, Table, met
from benchmarks.timing import nothing_compiled, ratio, seconds, until_compiled
from pyro_hamflow import HMC, MCMC, PseudoMarginalHMC
from pyro_hamflow.mcmc.kernels.base import Kernel
from pyro_hamflow.mcmc.transitions.base import Info, State

ABOUT = "Kernels: the whole time of sampling, per gradient"
_GOAL_SCHOOLS, _GOAL_GLMM = 1.5, 1.15


@dataclass
class Pacer:
    """Halts a run after every block of draws, to time what the run consists of.

    Attributes:
        block: How many draws make a block.
        halt: Called between blocks; its seconds do not count as sampling.
        blocks: The seconds of each block.
    """

    block: int
    halt: Callable[[Kernel], None]
    blocks: list[float] = field(default_factory=list)
    _count: int = -1
    _resumed: float = 0.0

    def between(self, kernel: Kernel) -> None:
        """To be called before each draw."""
        self._count += 1
        if self._count % self.block:
            return
        if self._count:
            self.blocks.append(time.perf_counter() - self._resumed)
        self.halt(kernel)
        self._resumed = time.perf_counter()


class _Paced:
    """A kernel that tells its pacer before every draw."""

    pacer: Pacer

    def advance(self, state: State) -> tuple[State, Info]:
        kernel: Any = self
        if not kernel.warming:
            self.pacer.between(kernel)
        return super().advance(state)  # type: ignore[misc]


class PacedHMC(_Paced, HMC):
    pass


class PacedPseudoMarginalHMC(_Paced, PseudoMarginalHMC):
    pass


def measure(*, quick: bool) -> list[Table]:
    """Sampling against bare gradients, on both posteriors."""
    rows = [_schools(chains, quick=quick) for chains in ((64,) if quick else (4, 64))]
    many = rows[-1]["sampling / gradient"]
    schools = Table(
        "Eight schools, HMC",
        rows,
        f"At 64 chains sampling takes {many:.2f} times its gradients; the rest is one program call "
        "per leapfrog step, momenta, the Metropolis test and the record of each draw.",
        f"at most {_GOAL_SCHOOLS} at 64 chains: {met(many <= _GOAL_SCHOOLS)} ({many:.3g}).",
    )
    sizes = (8,) if quick else (32, 128)
    settings = [(n, method) for n in sizes for method in ("joint", "conditional")]
    rows = [_glmm(n, method, quick=quick) for n, method in settings]
    worst = max(row["less densities / gradient"] for row in rows)
    glmm = Table(
        "GLMM, PseudoMarginalHMC, 4 chains, Laplace proposals, independent points",
        rows,
        "A draw also evaluates densities, with the random effects recovered: one at the end of a "
        "joint move, two in a conditional one; the last column leaves their time out and is "
        f"{worst:.2f} at most. The bare gradient is the one that the method follows: of parameters "
        "and noise for joint moves, of parameters alone for conditional ones.",
        f"at most {_GOAL_GLMM}, densities left out: {met(worst <= _GOAL_GLMM)} ({worst:.3g}).",
    )
    return [schools, glmm]


def _schools(chains: int, *, quick: bool) -> Row:
    kernel = PacedHMC(schools_noncentred, jit_compile=True)
    found = _pace(
        kernel,
        "gradient",
        schools_data(),
        chains=chains,
        warmup=60 if quick else 500,
        blocks=3 if quick else 15,
        block=20 if quick else 200,
    )
    return {"chains": chains} | {k: v for k, v in found.items() if "densit" not in k}


def _glmm(num_particles: int, method: str, *, quick: bool) -> Row:
    marginal = marginal_glmm("laplace", "iid", num_particles)
    kernel = PacedPseudoMarginalHMC(marginal, method=method, full_mass=True, jit_compile=True)
    found = _pace(
        kernel,
        "gradients" if method == "joint" else "gradient",
        glmm_arguments(),
        chains=4,
        warmup=20 if quick else 150,
        blocks=2 if quick else 10,
        block=3 if quick else 640 // num_particles,
        initial_params=glmm_starts(),
    )
    return {"method": method, "particles": num_particles} | found


def _pace(
    kernel: Any,
    kind: str,
    arguments: tuple[Any, ...],
    *,
    chains: int,
    warmup: int,
    blocks: int,
    block: int,
    initial_params: dict[str, Tensor] | None = None,
) -> Row:
    """Samples through the runner; between blocks, times bare gradients and densities there."""
    gradient_times: list[float] = []
    density_times: list[float] = []

    def halt(kernel: Any) -> None:
        potential = kernel.potential
        vectors = potential.vectors(chains)
        program = potential.programs.program(kind, chains)
        until_compiled(program, *vectors)
        gradient_times.append(_per_call(lambda: program(*vectors)))
        density_times.append(_per_call(lambda: potential.evaluate(*vectors)))

    kernel.pacer = Pacer(block, halt)
    mcmc = MCMC(
        kernel,
        num_samples=blocks * block + 1,
        warmup_steps=warmup,
        num_chains=chains,
        initial_params=initial_params,
        seed=0,
        disable_progbar=True,
    )
    with nothing_compiled():
        mcmc.run(*arguments)
    counts = {
        name: mcmc.draws.stats[name][0, : blocks * block].reshape(blocks, block).sum(1)
        for name in ("n_gradients", "n_densities")
    }
    times = torch.tensor(kernel.pacer.blocks)
    gradients, densities = counts["n_gradients"], counts["n_densities"]
    # Each block lies between two measurements of the bare programs.
    bare = _between(gradient_times)
    density = _between(density_times)
    whole = (times / gradients).tolist()
    rest = ((times - densities * torch.tensor(density)) / gradients).tolist()
    return {
        "gradients per draw": float(gradients.double().mean()) / block,
        "densities per draw": float(densities.double().mean()) / block,
        "bare gradient, us": 1e6 * statistics.median(bare),
        "bare density, us": 1e6 * statistics.median(density),
        "sampling per gradient, us": 1e6 * statistics.median(whole),
        "sampling / gradient": ratio(whole, bare),
        "less densities / gradient": ratio(rest, bare),
        "capture, compilation and warm-up, s": mcmc.warmup_time,
    }


def _per_call(function: Callable[[], Any]) -> float:
    once = min(seconds(function)[0] for _ in range(2))
    calls = max(3, min(2000, round(0.1 / once)))
    return seconds(lambda: [function() for _ in range(calls)])[0] / calls


def _between(values: list[float]) -> list[float]:
    return [0.5 * (a + b) for a, b in zip(values[:-1], values[1:], strict=True)]
