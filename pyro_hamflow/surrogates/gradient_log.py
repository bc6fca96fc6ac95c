"""What true gradients find on their way, kept to learn from."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.dynamics.kinetic import velocity
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.networks.training import BLOCK, HELD_OUT
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.program_cache import key_of
from pyro_hamflow.surrogates.losses import Points, Trajectories
from pyro_hamflow.surrogates.targets import StandIn

_TYPICAL = 3  # nats for each dimension, and six more, from the median energy
_FEWEST = 32
COMPILED = 0.15  # of an uncompiled program's time
_EXACT = 1e-3  # of a kick, by which neighbours along a trajectory may miss


def synchronize(example: Tensor) -> None:
    """Waits for a device that computes behind Python's back, before time is read."""
    if example.is_cuda:
        torch.cuda.synchronize(example.device)


def timed(function: Callable[..., Any], *inputs: Tensor) -> float:
    """The seconds that a call takes, the fastest of three after a first."""
    function(*inputs)
    best = math.inf
    for _ in range(3):
        synchronize(inputs[0])
        began = time.perf_counter()
        function(*inputs)
        synchronize(inputs[0])
        best = min(best, time.perf_counter() - began)
    return best


class Call(NamedTuple):
    """One evaluation of the true gradient.

    Attributes:
        position: Of shape ``(chains, dimension)``.
        value: The potential, of shape ``(chains,)``.
        gradient: Of shape ``(chains, dimension)``.
        wanted: Whether the chain's trajectory had not ended before, of shape ``(chains,)``.
        tuning: That of the trajectory.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    wanted: Tensor
    tuning: Tuning | None

    def step_sizes(self) -> Tensor:
        """Of each chain."""
        assert self.tuning is not None
        return self.tuning.step_sizes(self.position)

    def inverse_mass(self, count: int) -> Tensor:
        """The inverse mass as a matrix, repeated."""
        assert self.tuning is not None
        mass = self.tuning.kinetic.inverse_mass
        matrix = torch.diag(mass) if mass.dim() == 1 else mass
        return matrix.expand(count, *matrix.shape)

    def kick(self) -> Tensor:
        """By how much the gradient bends the trajectory, of shape ``(chains, dimension)``."""
        assert self.tuning is not None
        speed = velocity(self.tuning.kinetic.inverse_mass, self.gradient)
        return self.step_sizes()[:, None].square() * speed


class _Asked(Exception):
    """Ends a function at the gradient that it asks for."""


class Recorder(StandIn):
    """A potential that keeps what its gradient finds.

    The gradient runs as a program of its own, between those of what is done before and after it.

    Arguments:
        potential: The true one.

    Attributes:
        calls: What was found, in order.
        recording: Whether more is kept.
        tuning: What is noted with it.
        calls_ahead: How many are foreseen: the program is not compiled for a few.
    """

    def __init__(self, potential: Potential) -> None:
        super().__init__(potential)
        self.calls: list[Call] = []
        self.recording = True
        self.tuning: Tuning | None = None
        self.calls_ahead = 0.0
        self._seconds: dict[Program, float] = {}
        self._programs: dict[tuple[Any, ...], Program] = {}
        self._stand_in: Program | None = None

    def graph(self, kind: str, num_chains: int) -> Program:
        """The gradient of every chain, kept."""

        def gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            if self._stand_in is not None:
                return self._stand_in(position, noise)
            program = self.potential.program(kind, num_chains, self.calls_ahead)
            value, slope = program(position, noise)
            if self.recording:
                wanted = torch.ones_like(value, dtype=torch.bool)
                self.calls.append(Call(position, value, slope, wanted, self.tuning))
            return value, slope

        return gradient

    def seconds(self, num_chains: int) -> float:
        """What the gradient of all chains takes."""
        program, rows = self._block(num_chains)
        if program not in self._seconds:
            self._seconds[program] = timed(program, *self.potential.vectors(rows))
        return self._seconds[program] * num_chains / rows

    def seconds_later(self, num_chains: int) -> float:
        """What it would take if it were compiled, where that is asked for and not done yet."""
        graph = isinstance(self._block(num_chains)[0], GraphModule)
        waits = self.potential.compile_graphs and graph
        return self.seconds(num_chains) * (COMPILED if waits else 1.0)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """What the potential says, by a program that is not compiled for a few calls either."""
        return self.potential.evaluate(position, noise, calls=self.calls_ahead)

    def _block(self, num_chains: int) -> tuple[Program, int]:
        """What the gradient of all chains is made of, and how many it serves at once."""
        rows = self.potential.rows_at_once("gradient", num_chains)
        calls = self.calls_ahead * num_chains / rows
        return self.potential.program("gradient", rows, calls), rows

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """A function that asks for the gradient once, or never, captured around it."""
        key = key_of(name, *examples)
        if key not in self._programs:
            self._programs[key] = self._around_gradient(name, function, *examples)
        return self._programs[key]

    def _around_gradient(self, name: str, function: Program, *examples: Tensor) -> Program:
        def before(*inputs: Tensor) -> tuple[Tensor, ...]:
            def stop(*where: Tensor) -> Any:
                raise _Asked(*where)

            try:
                self._with(stop, function, *inputs)
            except _Asked as asked:
                return asked.args
            return ()

        def after(value: Tensor, slope: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self._with(lambda *_: (value, slope), function, *inputs)

        accelerate = partial(self.potential.accelerate, calls=0.0)
        asked = before(*examples)
        if not asked:
            return accelerate(name, function, *examples)
        position = asked[0]
        gradient = self.graph("gradient", len(position))
        found = (position[:, 0], position)
        end = accelerate(f"{name} after the gradient", after, *found, *examples)
        if end is after:  # where nothing is captured, there is nothing to go around
            return function
        begin = accelerate(f"{name} before the gradient", before, *examples)
        return lambda *inputs: end(*gradient(*begin(*inputs)), *inputs)

    def _with(self, stand_in: Program, function: Program, *inputs: Tensor) -> Any:
        """What a function returns where something stands in for the gradient."""
        self._stand_in = stand_in
        try:
            return function(*inputs)
        finally:
            self._stand_in = None

    def settle(self, first: int, num_steps: Tensor) -> None:
        """Marks, from a call on, what was computed for chains whose trajectories had ended."""
        for i, call in enumerate(self.calls[first:]):
            self.calls[first + i] = call._replace(wanted=i < num_steps)

    @property
    def num_gradients(self) -> int:
        """How many gradients were computed, over all chains."""
        return sum(int(call.wanted.sum()) for call in self.calls)

    def points(self, most: int) -> tuple[Points, Tensor | None]:
        """What was found where draws may lie, the latest of it if there is more than asked for.

        Where chains came from, energies are so far from the typical ones that these would be lost.

        Returns:
            The points; and which of them are held out, every time, if there are enough.

        Raises:
            ValueError: If there is hardly anything.
        """
        if not self.calls:
            raise ValueError("no gradients were found")
        first, found = len(self.calls), 0
        while found < most and first > 0:
            first -= 1
            found += len(self.calls[first].value)
        pairs = list(zip(self.calls, self._held_out(), strict=True))[first:]
        held_out = torch.cat([torch.full_like(call.wanted, out) for call, out in pairs])
        parts = zip(*(call[:4] for call, _ in pairs), strict=True)
        position, value, gradient, wanted = map(torch.cat, parts)
        good = wanted & value.isfinite() & gradient.isfinite().all(-1)
        if int(good.sum()) < _FEWEST:
            raise ValueError(f"{int(good.sum())} finite gradients were found, fewer than {_FEWEST}")
        latest = value[good][-max(_FEWEST, int(good.sum()) // 4) :]
        good &= (value - latest.median()).abs() < _TYPICAL * (self.dimension + 6)
        position, value, gradient = position[good], value[good], gradient[good]
        held_out = held_out[good]
        points = Points(position, value, gradient, position[:, :0])
        return points, held_out if int(held_out.sum()) >= BLOCK else None

    def _held_out(self) -> list[bool]:
        """Whether each call is: some blocks of neighbours along trajectories, and some stars."""
        steps, stars, held_out = 0, 0, []
        for call in self.calls:
            star = call.tuning is None
            block = stars if star else steps // BLOCK
            steps, stars = steps + (not star), stars + star
            held_out.append(block % HELD_OUT == 1)
        return held_out

    def trajectories(self, num_steps: int, most: int) -> Trajectories:
        """Stretches of true trajectories, the latest if there are more than asked for.

        Three neighbours of a trajectory tell each other: the second difference of their positions
        is the kick at the one between. Where that holds all along, a stretch was found.
        """
        calls = [call for call in self.calls if call.tuning is not None][-most:]
        position = torch.stack([call.position for call in calls])  # calls, chains, dimension
        kicks = torch.stack([call.kick() for call in calls])
        second = position[2:] - 2.0 * position[1:-1] + position[:-2]
        miss = (second + kicks[1:-1]).abs().amax(-1)
        fine = miss <= _EXACT * kicks[1:-1].abs().amax(-1)
        same = [a.tuning is b.tuning for a, b in zip(calls, calls[2:], strict=False)]
        wanted = torch.stack([call.wanted for call in calls])
        fine &= torch.tensor(same, device=fine.device)[:, None] & wanted[2:]
        stretches = []
        for start in range(len(calls) - num_steps):
            whole = fine[start : start + num_steps - 1].all(0)
            rows = position[start : start + num_steps + 1, whole].transpose(0, 1)
            sizes = calls[start].step_sizes()[whole]
            stretches.append((rows, sizes, calls[start].inverse_mass(int(whole.sum()))))
        if not stretches:
            raise ValueError(f"there is no true trajectory of {num_steps} steps to learn from")
        return Trajectories(*(torch.cat(part) for part in zip(*stretches, strict=True)))
