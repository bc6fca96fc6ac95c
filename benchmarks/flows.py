"""Hamiltonian flows: what a training step costs, and how they do beside other flows."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import zuko
from torch import Tensor, nn

from benchmarks.models import logistic, logistic_data, schools_data, schools_noncentred
from benchmarks.report import Row, Table, met
from benchmarks.timing import side_by_side
from pyro_hamflow import AutoNeuralHamiltonianFlow, NeuralHamiltonianFlow, importance_sample
from pyro_hamflow.dynamics.integrators import leapfrog
from pyro_hamflow.flows.energy import energy
from pyro_hamflow.model.potential import Potential

ABOUT = "Hamiltonian flows"
_BATCH, _STEPS = 512, 10
_GOOD = 0.7
_RATES = (1e-2, 5e-3, 2e-3)


def measure(*, quick: bool) -> list[Table]:
    """Time per step against its floor and against autograd; guides against those of zuko."""
    return [_step_table(quick=quick), _guide_table(quick=quick)]


# --- a training step ----------------------------------------------------------------------------


class _AutogradFlow(NeuralHamiltonianFlow):
    """The same flow as one writes it: torch's own layers, and its gradient by autograd."""

    joined = True

    def _move(
        self, q: Tensor, p: Tensor, time: float, num_steps: int | None = None
    ) -> tuple[Tensor, Tensor]:
        inverse_mass = self.kinetic.inverse_mass
        size, count = time / self.num_steps, self.num_steps

        def gradient(q: Tensor) -> Tensor:
            q = q if q.requires_grad else q.detach().requires_grad_()
            x = q
            for layer in self.potential_network.layers:
                x = torch.tanh(layer(x))
            value = (x @ self.potential_network.last.sum(0)).sum()
            return torch.autograd.grad(value, q, create_graph=True)[0]

        def velocity(p: Tensor) -> Tensor:
            return p @ inverse_mass

        if self.joined:
            return leapfrog(gradient, velocity, q, p, size, count)
        for _ in range(count):
            q, p = leapfrog(gradient, velocity, q, p, size, 1)
        return q, p


class _PlainFlow(_AutogradFlow):
    """The same with the gradient taken at both ends of each step, as it is often written."""

    joined = False


def _step_table(*, quick: bool) -> Table:
    rows = [
        _step_row(dimension, width, dtype, quick=quick)
        for dtype in (torch.float32, torch.float64)
        for dimension, width in ((2, 32), (2, 128), (32, 128))
    ]
    floor = min(float(row["times the floor"]) for row in rows)
    autograd = max(float(row["autograd, times slower"]) for row in rows)
    plain = min(float(row["autograd at both ends, times slower"]) for row in rows)
    return Table(
        f"A training step, in milliseconds: {_BATCH} samples, {_STEPS} leapfrog steps",
        rows,
        "Two hidden layers. The floor makes the matrix products of the step, forward and backward, "
        "and nothing else. Autograd is the same flow written with torch's own layers, its gradient "
        "left to automatic differentiation; at both ends, it is evaluated twice in each step, as "
        "flows are often written.",
        reach=f"at most 1.5 times the floor: {met(floor <= 1.5)} at best ({floor:.2f}); at least "
        f"twice as fast as autograd: {met(autograd >= 2)} at best ({autograd:.2f}) where it is "
        f"evaluated once in each step, {met(plain >= 2)} at worst ({plain:.2f}) at both ends.",
    )


def _step_row(dimension: int, width: int, dtype: torch.dtype, *, quick: bool) -> Row:
    base = dist.Normal(torch.zeros(dimension, dtype=dtype), 1.0).to_event(1)
    settings: dict[str, Any] = {"base": base, "hidden": (width, width), "num_steps": _STEPS}
    samples = torch.randn(_BATCH, dimension, dtype=dtype)

    def step_of(kind: type[NeuralHamiltonianFlow]) -> Callable[[], None]:
        torch.manual_seed(0)
        flow = kind(dimension, **settings)

        def step() -> None:
            flow.zero_grad()
            (-flow.log_ratio(samples).mean()).backward()

        return step

    times = side_by_side(
        {
            "flow": step_of(NeuralHamiltonianFlow),
            "floor": _floor(dimension, width, dtype),
            "autograd": step_of(_AutogradFlow),
            "plain": step_of(_PlainFlow),
        },
        rounds=3 if quick else 15,
        share=0.02 if quick else 0.2,
    )
    middle = {name: statistics.median(values) for name, values in times.items()}
    return {
        "type": str(dtype).removeprefix("torch."),
        "dimension": dimension,
        "width": width,
        "flow, ms": 1e3 * middle["flow"],
        "floor, ms": 1e3 * middle["floor"],
        "times the floor": middle["flow"] / middle["floor"],
        "autograd, ms": 1e3 * middle["autograd"],
        "autograd, times slower": middle["autograd"] / middle["flow"],
        "autograd at both ends, times slower": middle["plain"] / middle["flow"],
    }


def _floor(dimension: int, width: int, dtype: torch.dtype) -> Callable[[], None]:
    """The matrix products of a step: of each gradient, of the mass, and of both encoders."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype)

    narrow, wide = random(_BATCH, dimension), random(_BATCH, width)
    first, middle, mass = (
        random(width, dimension),
        random(width, width),
        random(dimension, dimension),
    )

    def layer(outer: Tensor, inner: Tensor, weight: Tensor) -> list[tuple[Tensor, Tensor]]:
        """A layer's product, and the two of its derivative, as narrow ones are fast."""
        turned = weight.mT.contiguous().mT
        return [(inner, weight.mT), (outer, turned), (inner.mT, outer)]

    network = [*layer(wide, narrow, first), *layer(wide, wide, middle)]
    gradient = 2 * network  # the network there, and its adjoints back
    encoder = [*network, *layer(narrow, wide, first.mT)]
    velocity = layer(narrow, narrow, mass)
    products = gradient * (_STEPS + 1) + velocity * _STEPS + 2 * encoder

    def step() -> None:
        for left, right in products:
            left @ right

    return step


# --- guides -------------------------------------------------------------------------------------


def nine_modes() -> None:
    """A normalised mixture of nine normals."""
    grid = torch.tensor([-2.5, 0.0, 2.5])
    flat = dist.Normal(torch.zeros(2), 1.0).to_event(1).mask(False)  # noqa: FBT003
    x = pyro.sample("x", flat)
    parts = dist.Normal(torch.cartesian_prod(grid, grid), 0.5).to_event(1).log_prob(x)
    pyro.factor("mixture", parts.logsumexp(-1) - math.log(9))


class ZukoGuide(nn.Module):
    """A flow of zuko in the coordinates that a Hamiltonian guide starts in."""

    def __init__(
        self, flow: Callable[..., Any], start: AutoNeuralHamiltonianFlow, count: int
    ) -> None:
        super().__init__()
        self.loc, self.scale_tril = start.loc, start.scale_tril
        widths = {}
        for width in range(4, 129, 2):
            made = flow(len(self.loc), width)
            widths[width] = abs(_size(made) - count)
        torch.manual_seed(0)
        self.flow = flow(len(self.loc), min(widths, key=lambda w: widths[w])).to(self.loc)

    def prepare(self, *args: Any) -> None:
        """Nothing is needed."""

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        x, log_density = self.flow().rsample_and_log_prob((count,))
        log_det = self.scale_tril.diagonal().log().sum()
        return self.loc + x @ self.scale_tril.mT, log_density - log_det


FLOWS = {
    "RealNVP": lambda d, w: zuko.flows.RealNVP(d, transforms=4, hidden_features=(w, w)),
    "NSF": lambda d, w: zuko.flows.NSF(d, transforms=3, hidden_features=(w, w), passes=2),
}


def _guide_table(*, quick: bool) -> Table:
    wide = dist.Normal(torch.zeros(2), 2.5).to_event(1)
    targets = {
        "eight schools": (schools_noncentred, schools_data(), {}, 64),
        "nine modes": (nine_modes, (), {"start": wide}, 128),
        "logistic, 31 parameters": (logistic, logistic_data(), {}, 64),
    }
    rows = [
        row
        for name, target in targets.items()
        for row in _compare(name, *target, steps=40 if quick else 1500)
    ]
    return Table(
        "Guides trained for 1,500 steps of Adam",
        rows,
        "All begin in the same coordinates (the Laplace approximation's; for nine modes a normal "
        "distribution of standard deviation 2.5) and are trained in the same loop on the same "
        "captured gradient; of three learning rates the one with the best bound is shown for "
        "each. Seconds are of training, until k of 10,000 weights was first below 0.7 (looked at "
        "ten times), and in all; starting is not counted. The flows of zuko have the parameters "
        "nearest in number: RealNVP four couplings, NSF three spline couplings. RealNVP's bound is "
        "the better one on all three, for it pays for no momenta, in about the same time; the "
        "Hamiltonian guide comes below 0.7 as soon, and many times sooner than spline couplings, "
        "which are by far the best on nine modes. A reverse encoder, at as many parameters, raises "
        f"the bound by {_raised(rows)} nats.",
    )


def _raised(rows: list[Row]) -> str:
    """By how much a reverse encoder raises each target's bound, at as many parameters."""
    bounds = {(row["target"], row["guide"]): row["bound"] for row in rows}
    return ", ".join(
        f"{bounds[target, 'the same, as many parameters'] - bounds[target, 'Hamiltonian']:.2f} "
        f"({target})"
        for target in dict.fromkeys(row["target"] for row in rows)
    )


def _compare(
    name: str,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    settings: dict[str, Any],
    particles: int,
    *,
    steps: int,
) -> list[Row]:
    potential = Potential(model, args, {}, separate_noise=True, compile_graphs=True)

    def ours(*, reverse_encoder: bool = False, width: int = 32) -> AutoNeuralHamiltonianFlow:
        torch.manual_seed(0)
        guide = AutoNeuralHamiltonianFlow(
            model, reverse_encoder=reverse_encoder, hidden=(width, width), **settings
        )
        guide.prepare(*args)
        return guide

    start = ours()
    count = _size(start)

    def excess(width: int) -> int:
        flow = NeuralHamiltonianFlow(
            start.dimension, hidden=(width, width), encode_start=True, stiffness=1.0
        )
        return abs(_size(flow) - count)

    narrow = min(range(8, 33), key=excess)
    makers: dict[str, Callable[[], Any]] = {
        "Hamiltonian": ours,
        "Hamiltonian, reverse encoder": lambda: ours(reverse_encoder=True),
        "the same, as many parameters": lambda: ours(reverse_encoder=True, width=narrow),
        **{label: lambda flow=flow: ZukoGuide(flow, start, count) for label, flow in FLOWS.items()},
    }
    rows = []
    for label, make in makers.items():
        tries = [
            _train(make(), potential, model, args, particles, rate, steps=steps) for rate in _RATES
        ]
        best = max(tries, key=lambda row: float(row["bound"]))
        rows.append({"target": name, "guide": label} | best)
    return rows


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _train(
    guide: Any,
    potential: Potential,
    model: Callable[..., Any],
    args: tuple[Any, ...],
    particles: int,
    rate: float,
    *,
    steps: int,
) -> Row:
    optimizer = torch.optim.Adam(guide.parameters(), rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    noise = potential.draw_noise(particles)

    def bound(count: int) -> Tensor:
        position, log_density = guide.draw(count)
        return -(log_density + energy(potential, position, noise[:1].expand(count, -1))).mean()

    bound(particles)  # compiles
    torch.manual_seed(1)
    seconds, good = 0.0, math.nan
    for step in range(steps):
        began = time.perf_counter()
        optimizer.zero_grad()
        loss = -bound(particles)
        loss.backward()
        optimizer.step()
        schedule.step()
        seconds += time.perf_counter() - began
        if (step + 1) % (steps // 10) == 0 and math.isnan(good):
            if importance_sample(model, guide, *args, seed=step).pareto_k < _GOOD:
                good = seconds
    found = importance_sample(model, guide, *args, num_samples=20_000, seed=0)
    with torch.no_grad():
        final = statistics.fmean(float(bound(particles)) for _ in range(100))
    return {
        "parameters": sum(p.numel() for p in guide.parameters() if p.requires_grad),
        "learning rate": rate,
        "bound": round(final, 3),
        "log evidence": round(found.log_evidence, 3),
        "its error": found.log_evidence_error,
        "Pareto k": found.pareto_k,
        "ESS, per cent": 100 * found.ess / 20_000,
        "s to k < 0.7": good,
        "s in all": seconds,
    }
