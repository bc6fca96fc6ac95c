"""What learning costs, measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.training import GradientMatching, Points, Training, fit_energy
from pyro_hamflow.mcmc.recorder import synchronize
from pyro_hamflow.mcmc.surrogate import EndpointTransition
from pyro_hamflow.mcmc.transition import Info, Transition
from pyro_hamflow.model.potential import Potential

_BATCH, _STEPS = 256, 20
_MOST_LOST = 0.1  # of the time that true gradients would take, spent in vain


@dataclass
class SurrogateReport:
    """How a surrogate came about, and what it is good for.

    Attributes:
        trainings: What each training took and reached, the first, and each after a refill of data.
        n_gradients: True gradients spent on its data, over all chains.
        acceptance: The share of its proposals that were accepted in the trial.
        true_seconds: Of an iteration along true gradients, measured.
        surrogate_seconds: Of an iteration of the surrogate, measured.
        following: ``"surrogate"`` or ``"true gradients"``: what the draws follow.
        reason: Why, in a sentence.
    """

    trainings: list[Training] = field(default_factory=list)
    n_gradients: int = 0
    acceptance: float = math.nan
    true_seconds: float = math.nan
    surrogate_seconds: float = math.nan
    following: str = "surrogate"
    reason: str = ""


class Trial:
    """Iterations of a transition, as they were measured.

    Attributes:
        steps: Of the integrator, those of the chain that made the most.
        rates: Acceptance probabilities of all chains.
        times: Seconds.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.rates: list[Tensor] = []
        self.times: list[float] = []

    def note(self, info: Info, seconds: float) -> None:
        """Takes in an iteration."""
        self.steps.append(float(torch.as_tensor(info.n_steps).max()))
        self.rates.append(info.acceptance_rate)
        self.times.append(seconds)

    @property
    def rate(self) -> float:
        """The mean acceptance probability in the second half."""
        rates = self.rates[len(self.rates) // 2 :]
        return float(torch.stack(rates).mean()) if rates else math.nan

    @property
    def mean_steps(self) -> float:
        """Of an iteration."""
        return max(1.0, sum(self.steps) / max(1, len(self.steps)))

    def costs(
        self, potential: Potential, transition: Transition, true_share: float, *, observed: bool
    ) -> tuple[float, float]:
        """Seconds of an iteration along true gradients, and of one along the surrogate.

        Arguments:
            potential: The true one.
            transition: What was tried.
            true_share: How often true gradients are followed all the same.
            observed: Whether the times hold a true gradient that was computed to learn from.
        """
        chains = len(self.rates[-1])
        position, noise = potential.vectors(chains)
        gradient = timed(potential.program("gradient", chains), position, noise)
        density = timed(potential.evaluate, position, noise)
        mine, steps = statistics.median(self.times), self.mean_steps
        if observed:
            mine -= gradient
        if isinstance(transition, EndpointTransition):
            each = max(mine - density, 0.0) / steps
            steps /= transition.num_transitions
        else:
            each = max(mine / steps - density, 0.0)
        true = steps * (gradient + each)
        return true, mine + true_share * true


def affordable_steps(ahead: float, each: float) -> int:
    """How many steps of training cost little beside the seconds of gradients that are ahead."""
    return int(_MOST_LOST * ahead / each)


def not_worth_it(acceptance: float, efficiency: float, true: float, mine: float) -> str | None:
    """Why true gradients are worth more than the surrogate, if so.

    Arguments:
        acceptance: Of the surrogate's proposals.
        efficiency: What a draw of the surrogate is worth, beside one along true gradients.
        true: Seconds of an iteration along these.
        mine: Seconds of one of the surrogate's.
    """
    if efficiency * true > mine:
        return None
    return (
        f"{acceptance:.0%} of the surrogate's proposals were accepted, at {1e3 * mine:.2g} "
        f"milliseconds each, where an iteration along true gradients takes {1e3 * true:.2g}"
    )


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


def training_seconds(potential: Potential, hidden: Sequence[int]) -> float:
    """The seconds that a step of a network's training takes, once it is under way."""
    with torch.random.fork_rng():
        z = torch.randn(_BATCH, potential.dimension).to(potential.example)
        points = Points(z, 0.5 * z.square().sum(-1), z, z[:, :0])
        network = PotentialNetwork(potential.dimension, hidden=hidden).to(z)
        matching, begins = GradientMatching(), list[float]()

        def noted(network: PotentialNetwork, points: Points) -> Tensor:
            synchronize(points.position)
            begins.append(time.perf_counter())
            return matching(network, points)

        fit_energy(network, points, loss=noted, steps=_STEPS)
    return statistics.median(b - a for a, b in pairwise(begins[_STEPS // 2 :]))
