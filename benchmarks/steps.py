"""Where the time of NUTS goes, step by step."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import models
from benchmarks.report import Row, Table
from benchmarks.timing import seconds, side_by_side, until_compiled
from pyro_hamflow import NUTS
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.tree import Point
from pyro_hamflow.mcmc.transitions.tree_builder import TreeBuilder

ABOUT = "NUTS: where the time goes"


def measure(*, quick: bool) -> list[Table]:
    """A step of the trajectories of all chains, and what it consists of."""
    cases: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "eight schools": (models.schools_noncentred, models.schools_data()),
        "breast cancer, 31 parameters": (models.logistic, models.logistic_data()),
        "normal, 100 dimensions": (models.correlated, models.correlated_data()),
        "GLMM, 513 parameters": (models.joint_glmm, models.glmm_arguments(spread=1.0)),
    }
    rows: list[Row] = []
    for name, (model, arguments) in cases.items():
        for chains in (4,) if "GLMM" in name else (4, 64):
            rows.append(
                {"posterior": name, "chains": chains}
                | _profile(model, arguments, chains, quick=quick)
            )
    return [
        Table(
            "A step of all chains, in microseconds",
            rows,
            "A step is one call of a program that moves every chain by one leapfrog step and keeps "
            "the books of its tree; the gradient alone is another program, timed beside it. What "
            "the step takes beyond it are its own arithmetic and some sixty small tensors, which "
            "cost 0.4 microseconds each to make and to drop. The rest of a draw, shared among its "
            "steps, are random numbers, the test whether all chains have ended, momenta and the "
            "record. Chains wait for the longest trajectory: steps made by the mean chain, and by "
            "the longest.",
        )
    ]


def _profile(
    model: Callable[..., Any], arguments: tuple[Any, ...], chains: int, *, quick: bool
) -> Row:
    torch.manual_seed(0)
    kernel = NUTS(model, jit_compile=True)
    warmup, draws = (30, 10) if quick else (300, 200)
    state = kernel.begin(chains, warmup, arguments)
    for _ in range(warmup):
        state, _ = kernel.advance(state)
    longest, mean = [], []

    def sample() -> None:
        nonlocal state
        for _ in range(draws):
            state, info = kernel.advance(state)
            longest.append(int(info.n_steps.max()))
            mean.append(float(info.n_steps.double().mean()))

    whole = seconds(sample)[0] / sum(longest)
    transition, tuning = kernel.phase.transition, kernel.phase.tuning
    assert isinstance(transition, NUTSTransition)
    step = _step(transition._builder, state, tuning)
    gradient = kernel.potential.programs.program("gradient", chains)
    until_compiled(gradient, state.position, state.noise)
    times = side_by_side(
        {"step": step, "gradient": lambda: gradient(state.position, state.noise)},
        rounds=3 if quick else 15,
        share=0.02 if quick else 0.1,
    )
    micro = {name: 1e6 * statistics.median(values) for name, values in times.items()}
    return {
        "gradient": micro["gradient"],
        "step": micro["step"],
        "whole draw, per step": 1e6 * whole,
        "steps, mean": statistics.mean(mean),
        "steps, longest": statistics.mean(longest),
    }


def _step(builder: TreeBuilder, state: Any, tuning: Any) -> Callable[[], Any]:
    still = torch.zeros_like(state.position.mT)
    start = Point(state.position.mT, still, state.gradient.mT)
    tensors, settings = builder._prepare(start, state.evaluation.value, state.noise, tuning, 1)
    program = builder._accelerate(tensors, settings)
    until_compiled(program, *tensors, *settings, builder._uniform)
    return lambda: program(*tensors, *settings, builder._uniform)
