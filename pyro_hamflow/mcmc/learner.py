"""How a kernel learns an energy in its warm-up: what it gathers, when and how it fits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.training import (
    Loss,
    Points,
    Training,
    Trajectories,
    TrajectoryMatching,
    fit_energy,
)
from pyro_hamflow.mcmc.recorder import Recorder
from pyro_hamflow.mcmc.surrogate_costs import affordable_steps, training_seconds
from pyro_hamflow.model.potential import Potential

_FEWEST_GATHER, _MOST_GATHER = 12, 0.3
_POINTS_PER_DIMENSION = 150
_TRIAL_SHARE = 0.15
_MOST_POINTS = 20_000
_FEWEST_STEPS = 200  # of the optimiser, that teach something
_FIRST_RATE, _LATER_RATE = 1e-2, 5e-3


@dataclass(frozen=True)
class Lessons:
    """What is learned, from how much, and how often.

    Arguments:
        hidden: The widths of the network's hidden layers.
        outputs: How many outputs of it are summed.
        loss: What is made small in training; gradients and energies are matched if not given.
        training_points: How many true gradients are gathered, over all chains, before the first
            training; 150 for each dimension, and 300, if not given.
        training_steps: The most steps of the optimiser in each training.
        rounds: How often the network is sent ahead and fitted again.

    Raises:
        ValueError: If a number lies outside its range.
    """

    hidden: tuple[int, ...]
    outputs: int
    loss: Loss | None
    training_points: int | None
    training_steps: int
    rounds: int

    def __post_init__(self) -> None:
        with torch.random.fork_rng():
            self.network(1)  # refuses bad sizes
        for name, number, least in (
            ("training_points", 1 if self.training_points is None else self.training_points, 1),
            ("training_steps", self.training_steps, 1),
            ("rounds", self.rounds, 0),
        ):
            at_least(name, number, least)

    def network(self, dimension: int) -> PotentialNetwork:
        """One that knows nothing."""
        return PotentialNetwork(dimension, hidden=self.hidden, outputs=self.outputs)


def at_least(name: str, number: int, least: int) -> None:
    """Refuses what is no integer, or too small a one.

    Raises:
        ValueError: With the argument's name, and what was expected.
    """
    if isinstance(number, bool) or not isinstance(number, int) or number < least:
        raise ValueError(f"`{name}` is {number!r}: expected an integer, {least} or more")


class Learner:
    """Keeps what true gradients find in a warm-up, and fits networks to it.

    Arguments:
        potential: The true one.
        lessons: What is learned.
        warmup_steps: Iterations of the warm-up.

    Attributes:
        recorder: The true potential, which keeps what is found.
        network: The latest; none before the first fit.
        training_steps: The most of the next fit.
        refits: After which iterations the network is fitted again.
    """

    def __init__(self, potential: Potential, lessons: Lessons, warmup_steps: int) -> None:
        self.recorder = Recorder(potential)
        self.lessons = lessons
        self.warmup_steps = warmup_steps
        self.network: PotentialNetwork | None = None
        self.training_steps = lessons.training_steps
        self.refits: list[int] = []

    @property
    def wanted(self) -> int:
        """How many true gradients are gathered before the first fit."""
        enough = _POINTS_PER_DIMENSION * (self.recorder.dimension + 2)
        return self.lessons.training_points or enough

    def forget_start(self, iteration: int) -> bool:
        """Forgets what was found where chains came from; whether it was all there is."""
        early = iteration <= _FEWEST_GATHER // 3
        if early:
            self.recorder.calls.clear()
        return early

    def knows_enough(self, iteration: int) -> bool:
        """Whether the first fit is due; if so, the iterations of the others are set."""
        full = iteration >= _FEWEST_GATHER and self.recorder.num_gradients >= self.wanted
        if not full and iteration < _MOST_GATHER * self.warmup_steps:
            return False
        rounds = self.lessons.rounds
        explore = self.warmup_steps - iteration - round(_TRIAL_SHARE * self.warmup_steps)
        self.refits = [iteration + explore * (i + 1) // rounds for i in range(rounds)]
        return True

    def is_last(self, iteration: int) -> bool:
        """Whether no fit comes after this iteration."""
        return iteration >= max([0, *self.refits])

    @property
    def verdict(self) -> int:
        """After which iteration it is seen whether the trial should be of another kind."""
        return (max([0, *self.refits]) + self.warmup_steps) // 2

    def fit(self) -> Training:
        """Fits the network to all that is known.

        Raises:
            ValueError: If there is too little.
            torch.linalg.LinAlgError: If it cannot be whitened.
        """
        loss, network, rate = self.lessons.loss, self.network, _LATER_RATE
        points = self.recorder.points(_MOST_POINTS)
        examples: Points | Trajectories = points
        if isinstance(loss, TrajectoryMatching):
            examples = self.recorder.trajectories(loss.num_steps, _MOST_POINTS)
        if network is None:
            rate = _FIRST_RATE
            network = self.lessons.network(self.recorder.dimension).to(self.recorder.example)
            network.whiten_by(points.position)
        training = fit_energy(
            network, examples, loss=loss, steps=self.training_steps, learning_rate=rate
        )
        self.network = network
        return training

    def too_dear(self, ahead: float) -> str | None:
        """Why training would take too long, beside the draws' true gradients, if so.

        Where a full training would, it is cut short.

        Arguments:
            ahead: The seconds that the draws' true gradients will take.
        """
        lessons, potential = self.lessons, self.recorder.potential
        each = training_seconds(potential, lessons.hidden) * (1 + lessons.rounds)
        self.training_steps = min(lessons.training_steps, affordable_steps(ahead, each))
        if self.training_steps >= min(lessons.training_steps, _FEWEST_STEPS):
            return None
        return (
            f"the draws' gradients will take {ahead:.2g} seconds, and training would take "
            f"{each * lessons.training_steps:.2g}"
        )
