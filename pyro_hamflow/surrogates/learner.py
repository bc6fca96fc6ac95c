"""How a kernel learns an energy in its warm-up: what it gathers, when and how it fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.checks import whole
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.surrogates.costs import Clock, affordable_steps, training_seconds
from pyro_hamflow.surrogates.fit import EnergyTraining, fit_energy
from pyro_hamflow.surrogates.gradient_log import GradientLog
from pyro_hamflow.surrogates.losses import (
    EnergyLoss,
    GradientMatching,
    Points,
    TrajectoryMatching,
    TrajectorySegments,
)
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

FEWEST_GATHER, _MOST_GATHER = 12, 0.3  # iterations, and of those of warm-up
_POINTS_PER_DIMENSION = 60  # true gradients before the first training
_TRIAL_SHARE = 0.15  # of warm-up, for the trial
_MOST_POINTS = 20_000  # that are learned from
_FEWEST_STEPS = 200  # of the optimiser, that teach something
_PASSING = 0.4  # of the steps, in all trainings but the last
_REACH, _ABOUT = 1.8, 0.3  # of the distance from the centre, of the scale
_SHRINKAGE, _FLOOR = 10.0, 1e-6  # points for each dimension that the diagonal is worth; least share
FIRST_RATE, _LATER_RATE = 1e-2, 5e-3  # of learning, by a new network and by one that goes on

# From positions and noise to noise that suits the positions, and how many densities it took.
RefreshAt = Callable[[Tensor, Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class TrainingSettings:
    """What is learned, from how much, and how often.

    Arguments:
        hidden: The widths of the network's hidden layers.
        outputs: How many outputs of it are summed.
        loss: What is made small in training; gradients and energies are matched if not given.
        training_points: How many true gradients are gathered, over all chains, before the first
            training; 60 for each dimension, and 120, if not given.
        training_steps: The most steps of the optimiser in each training.
        rounds: How often the network is sent ahead and fitted again.

    Raises:
        ValueError: If a number lies outside its range.
    """

    hidden: tuple[int, ...]
    outputs: int
    loss: EnergyLoss | None
    training_points: int | None
    training_steps: int
    rounds: int

    def __post_init__(self) -> None:
        with random_state_kept():
            self.network(1)  # refuses bad sizes
        for name, number, least in (
            ("training_points", 1 if self.training_points is None else self.training_points, 1),
            ("training_steps", self.training_steps, 1),
            ("rounds", self.rounds, 0),
        ):
            whole(name, number, least)

    def network(self, dimension: int) -> PotentialNetwork:
        """A network with its first, random weights."""
        return PotentialNetwork(dimension, hidden=self.hidden, outputs=self.outputs)


class Learner:
    """Keeps what true gradients find in a warm-up, and fits networks to it.

    Arguments:
        potential: The true one.
        settings: What is learned.
        warmup_steps: Iterations of the warm-up.
        native_draws: As in :class:`~pyro_hamflow.surrogates.costs.Clock`.

    Attributes:
        potential: The true one.
        log: What its gradients have found.
        clock: What its programs take.
        network: The latest; none before the first fit.
        covariance: Of the points that it was fitted to.
        training_steps: The most of the next fit.
        begun: How many iterations were over when it began to learn.
        refits: After which iterations the network is fitted again.
    """

    def __init__(
        self,
        potential: Potential,
        settings: TrainingSettings,
        warmup_steps: int,
        native_draws: float | None = None,
    ) -> None:
        self.potential = potential
        self.log = GradientLog()
        self._native_draws = native_draws
        self.clock = Clock(potential, self._native_draws)
        self.begun = 0
        self.settings = settings
        self.warmup_steps = warmup_steps
        self.network: PotentialNetwork | None = None
        self.covariance: Tensor | None = None
        self.training_steps = settings.training_steps
        self.refits: list[int] = []

    def start_over(self, potential: Potential, iteration: int) -> None:
        """Forgets what gradients have found, for they were those of another potential."""
        self.potential, self.begun = potential, iteration
        self.clock = Clock(potential, self._native_draws)
        self.log.entries.clear()

    @property
    def wanted(self) -> int:
        """How many true gradients are gathered before the first fit."""
        enough = _POINTS_PER_DIMENSION * (self.potential.dimension + 2)
        return self.settings.training_points or enough

    def forget_start(self, iteration: int) -> bool:
        """Forgets all gradients so far, if the run has only just begun; says whether it did.

        They were found where chains came from, far from the posterior.
        """
        early = iteration <= FEWEST_GATHER // 3
        if early:
            self.log.entries.clear()
        return early

    def knows_enough(self, iteration: int, num_proposals: int) -> bool:
        """Whether the first fit is due; if so, the iterations of the others are set.

        Arguments:
            iteration: That has just ended.
            num_proposals: How many iterations' proposals will be made together; no fit comes in
                between.
        """
        since, left = iteration - self.begun, self.warmup_steps - self.begun
        full = since >= FEWEST_GATHER and self.log.num_gradients >= self.wanted
        if not full and since < _MOST_GATHER * left:
            return False
        rounds = self.settings.rounds
        explore = self.warmup_steps - iteration - round(_TRIAL_SHARE * self.warmup_steps)
        sets = max(explore, 0) // num_proposals
        ends = {sets * (i + 1) // rounds for i in range(rounds)} - {0}
        self.refits = [iteration + num_proposals * end for end in sorted(ends)]
        return True

    def is_last(self, iteration: int) -> bool:
        """Whether no fit comes after this iteration."""
        return iteration >= max([0, *self.refits])

    @property
    def mid_trial(self) -> int:
        """The iteration in the middle of the last trial, after which its kind may be changed."""
        return (max([0, *self.refits]) + self.warmup_steps) // 2

    def gather_around(self, position: Tensor, noise: Tensor, refresh: RefreshAt) -> int:
        """Looks at true gradients about draws along the network, and further out.

        Where a network errs in the tails, it holds draws there for long: what it learns from has
        to lie where draws are held, and to reach further than they do.

        Arguments:
            position: The draws, of shape ``(draws, dimension)``.
            noise: Their noise, of shape ``(draws, noise_dimension)``.
            refresh: The move of the noise at other positions: it has to suit them, or the
                gradients' mean would be that of another density.

        Returns:
            How many densities it took for each draw, beside one gradient.

        Raises:
            RuntimeError: If no network has been fitted yet.
        """
        if self.network is None:
            raise RuntimeError("there is no network yet: call `fit` first")
        centre, seen, count = position.mean(0), position.clone(), 0
        seen[::2] += (_REACH - 1.0) * (position[::2] - centre)
        seen += _ABOUT * torch.randn_like(seen) @ self.network.root.mT
        if noise.shape[1]:
            noise, count = refresh(seen, noise)
        value, gradient = self.potential.programs.program("gradient", len(seen))(seen, noise)
        self.log.add(seen, value, gradient)
        return count

    def fit(self, *, passing: bool) -> EnergyTraining:
        """Fits the network to all that is known.

        Arguments:
            passing: Whether it will be fitted again, so that fewer steps will do.

        Raises:
            ValueError: If there is too little.
            torch.linalg.LinAlgError: If it cannot be whitened.
        """
        loss, network, rate = self.settings.loss, self.network, _LATER_RATE
        if loss is None and self.potential.noise_dimension:
            # The noise of an energy is shared by a whole trajectory: it would be learned by heart.
            loss = GradientMatching(energy_weight=0.0)
        points, held_out = self.log.points(_MOST_POINTS)
        self.covariance = _spread(points.position)
        examples: Points | TrajectorySegments = points
        if isinstance(loss, TrajectoryMatching):
            examples, held_out = self.log.trajectories(loss.num_steps, _MOST_POINTS), None
        if network is None:
            rate = FIRST_RATE
            network = self.settings.network(self.potential.dimension).to(self.potential.example)
            network.whiten_by(points.position)
        num_steps = math.ceil(_PASSING * self.training_steps) if passing else self.training_steps
        training = fit_energy(
            network,
            examples,
            held_out=held_out,
            loss=loss,
            num_steps=num_steps,
            learning_rate=rate,
        )
        self.network = network
        return training

    def too_costly(self, ahead: float) -> str | None:
        """Why training would take too long, beside the draws' true gradients, if so.

        Where a full training would, it is cut short.

        Arguments:
            ahead: The seconds that the draws' true gradients will take.
        """
        settings, potential = self.settings, self.potential
        each = training_seconds(potential, settings.hidden) * (1 + settings.rounds)
        self.training_steps = min(settings.training_steps, affordable_steps(ahead, each))
        if self.training_steps >= min(settings.training_steps, _FEWEST_STEPS):
            return None
        return (
            f"the draws' gradients will take {ahead:.2g} seconds, and training would take "
            f"{each * settings.training_steps:.2g}"
        )


def _spread(position: Tensor) -> Tensor:
    """The covariance of positions, shrunk towards its diagonal.

    Points of a few trajectories hardly leave a plane, and nothing could move out of it.
    """
    count, dimension = position.shape
    covariance = position.double().mT.cov().reshape(dimension, dimension)
    diagonal = covariance.diag().diag()
    floor = _FLOOR * covariance.diag().mean() * torch.eye(dimension).to(covariance)
    share = count / (count + _SHRINKAGE * dimension)
    return (share * covariance + (1.0 - share) * diagonal + floor).to(position)
