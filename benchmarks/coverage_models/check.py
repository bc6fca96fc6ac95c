"""Whether a model of the zoo is captured and batched, and its gradient Pyro's."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pyro
import torch
from pyro.infer.mcmc.util import initialize_model
from pyro.ops.integrator import potential_grad
from torch import Tensor
from torch.fx import GraphModule

from benchmarks.coverage_models.data import Case
from pyro_hamflow.model.potential import Potential

_POINTS = 3
_SPREAD = 0.5  # of the points, on the real line

PotentialFunction = Callable[[dict[str, Tensor]], Tensor]


@dataclass(frozen=True)
class Check:
    """What one model's gradient is like.

    Attributes:
        potential: The model's potential.
        stock: Pyro's own potential function.
        positions: Some points, of shape ``(points, dimension)``.
        captured: Whether the gradient is one graph.
        batched: Whether the graph serves many chains at once.
        error: The largest difference from Pyro's gradient, relative to its largest entry.
    """

    potential: Potential
    stock: PotentialFunction
    positions: Tensor
    captured: bool
    batched: bool
    error: float


def check(case: Case, *, compile_graphs: bool = False) -> Check:
    """Compares a model's gradient at some random points with Pyro's own."""
    pyro.clear_param_store()
    model, data = case.make()
    with _quietly():
        potential = Potential(model, (), data, compile_graphs=compile_graphs)
        torch.manual_seed(1)
        positions = _SPREAD * torch.randn(_POINTS, potential.dimension).to(potential.example)
        start = potential.unravel(positions[0])
        # Given a start, Pyro does not look for one.
        _, stock, _, _ = initialize_model(model, (), data, initial_params=start)
        program = potential.graph("gradient", _POINTS)
        values, slopes = program(positions, potential.draw_noise(_POINTS))
        errors = [
            _difference(value, slope, potential, stock, position)
            for value, slope, position in zip(values, slopes, positions, strict=True)
        ]
    captured = potential.programs.fallback_reason is None
    batched = captured and isinstance(program, GraphModule)
    return Check(potential, stock, positions, captured, batched, max(errors))


def _difference(
    value: Tensor, slope: Tensor, potential: Potential, stock: PotentialFunction, position: Tensor
) -> float:
    slopes, its_value = potential_grad(stock, potential.unravel(position))
    its_slope = torch.cat([slopes[site.name].reshape(-1) for site in potential.sites])
    if not (its_value.isfinite() and its_slope.isfinite().all()):
        return math.nan
    error = (slope - its_slope).abs().max() / its_slope.abs().max().clamp(min=1.0)
    return max(error.item(), ((value - its_value).abs() / its_value.abs().clamp(min=1.0)).item())


@contextmanager
def _quietly() -> Iterator[None]:
    """What is not captured says so; here it is counted."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
