"""What gradients, densities and learning cost, measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.networks.training import BATCH
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.compilation import SelfCompiling
from pyro_hamflow.programs.engines.choice import native_seconds_of
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.losses import GradientMatching, Points
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_STEPS = 20  # of a training whose time is taken
_MOST_LOST = 0.1  # of the time that true gradients would take, spent in vain
COMPILED = 0.15  # of an uncompiled program's time


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


class Judge(Protocol):
    """What computes true energies."""

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """As a target's."""


class Clock:
    """The seconds that a potential's programs take, measured once.

    Arguments:
        potential: The potential.
        native_draws: How many draws there will be, if machine code may follow true gradients.

    Attributes:
        potential: The same.
        judge: What computes the energies that judge a surrogate.
    """

    def __init__(self, potential: Potential, native_draws: float | None = None) -> None:
        self.potential = potential
        self.judge: Judge = potential
        self._native_draws = native_draws
        self._seconds: dict[tuple[str, int, bool], float] = {}

    def seconds(self, kind: str, num_chains: int) -> float:
        """Of a call of a kind's program for so many chains, as it is now."""
        return self._measured(kind, num_chains)[0]

    def seconds_later(self, kind: str, num_chains: int) -> float:
        """The same once the program is compiled, if that is asked for and not done yet: a guess."""
        seconds, waits = self._measured(kind, num_chains)
        return seconds * (COMPILED if waits else 1.0)

    def true_seconds(self, num_chains: int, steps: float) -> float:
        """Of a true gradient of so many chains in the draws: a guess, where it is not torch's.

        Arguments:
            num_chains: How many chains.
            steps: How many each draw takes: in machine code they share its compilation.
        """
        seconds = self.seconds_later("gradient", num_chains)
        graph = self.potential.programs.base("gradient")
        if self._native_draws is None or graph is None:
            return seconds
        return min(seconds, native_seconds_of(graph, num_chains, steps * self._native_draws))

    def seconds_of_judging(self, num_rows: int) -> float:
        """Of the true energies of so many proposals."""
        if self.judge is self.potential:
            return self.seconds("evaluate", num_rows)
        return timed(self.judge.evaluate, *self.potential.vectors(num_rows))

    def _measured(self, kind: str, num_chains: int) -> tuple[float, bool]:
        """The seconds, and whether the program is still to be compiled."""
        programs = self.potential.programs
        rows = programs.rows_at_once(kind, num_chains)
        program = programs.program(kind, rows)
        waits = isinstance(program, SelfCompiling) and not program.is_compiled
        key = kind, rows, waits
        if key not in self._seconds:
            self._seconds[key] = timed(program, *self.potential.examples(kind, rows))
        return self._seconds[key] * num_chains / rows, waits


def affordable_steps(ahead: float, each: float) -> int:
    """How many steps of training cost at most a tenth of the gradients that are ahead.

    Arguments:
        ahead: The seconds that these gradients will take.
        each: The seconds of a step of training.
    """
    return int(_MOST_LOST * ahead / each)


def training_seconds(potential: Potential, hidden: Sequence[int]) -> float:
    """The seconds that a step of a network's training takes, once it is under way."""
    with random_state_kept():
        z = torch.randn(BATCH, potential.dimension).to(potential.example)
        points = Points(z, 0.5 * z.square().sum(-1), z, z[:, :0])
        network = PotentialNetwork(potential.dimension, hidden=hidden).to(z)
        matching, begins = GradientMatching(), list[float]()

        def noted(network: PotentialNetwork, points: Points) -> Tensor:
            synchronize(points.position)
            begins.append(time.perf_counter())
            return matching(network, points)

        fit_energy(network, points, loss=noted, num_steps=_STEPS)
    return statistics.median(b - a for a, b in pairwise(begins[_STEPS // 2 :]))
