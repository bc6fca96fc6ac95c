"""A population on its way along a path of temperatures."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_hamflow.flows.near_identity import NearIdentity
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.model.tempered import Ends, TemperedTarget
from pyro_hamflow.smc.moves import PopulationMoves
from pyro_hamflow.smc.resampling import (
    conditional_size,
    effective_size,
    log_mean_exp,
    normalised,
    resample_systematically,
    sum_by_family,
)

_DEPLETED = 0.5  # of the effective size, below which particles are resampled
_SMALLEST_DRIFT = 0.2  # of the mean log ratio, below which it is of no interest
_MANY_NOISES = 4.0  # of it, beyond which a drift is no chance
_TAIL, _RANGE = 0.05, 3.29  # tails left out of a normal spread; what is left, in deviations


@dataclass(frozen=True)
class Rung:
    """One temperature of a schedule.

    Attributes:
        inverse_temperature: Between 0 and 1.
        tuning: Step size and mass of the moves there.
        flow: What carries particles there from the temperature before, if anything does.
    """

    inverse_temperature: float
    tuning: Tuning = field(repr=False)
    flow: NearIdentity | None = field(default=None, repr=False)


@dataclass(frozen=True)
class Passage:
    """What happened to a population at one temperature.

    Attributes:
        inverse_temperature: Between 0 and 1.
        ess: What the weights were worth on reaching it, as a share of the particles.
        acceptance_rate: Of the moves there.
    """

    inverse_temperature: float
    ess: float
    acceptance_rate: float


@dataclass(frozen=True)
class Drift:
    """How a population's mean log ratio changes as it moves on at the end of its path.

    A population that has reached the posterior keeps its distribution. The log evidence is the
    integral of the mean log ratio along the path; so what that has missed at each temperature is
    missing from the log evidence.

    Attributes:
        change: Of the mean.
        noise: Its standard deviation in a population that has arrived.
    """

    change: float
    noise: float

    @property
    def matters(self) -> bool:
        """Whether it is more than chance, and large enough to be of interest."""
        return abs(self.change) > max(_SMALLEST_DRIFT, _MANY_NOISES * self.noise)


class Particles:
    """A population, in parts that are resampled apart from each other.

    Arguments:
        target: The path; its temperature is that of the population, which draws from its start.
        shape: How many parts there are, and how many particles each has.

    Attributes:
        position: Of shape ``(replicates * particles, dimension)``; parts follow each other.
        noise: Of shape ``(replicates * particles, noise_dimension)``.
        moves: What moves it.
        log_weights: Since particles were resampled, of shape ``(replicates, particles)``.
        log_evidence: Of what has been resampled, of shape ``(replicates, 1)``.
        founder: Which of the first particles each descends from, of shape
            ``(replicates * particles,)``.
        variance_of_steps: The evidence's relative variance, times the number of particles, if moves
            made these independent of each other at each temperature.
    """

    def __init__(self, target: TemperedTarget, shape: tuple[int, int]) -> None:
        self.target, self.shape = target, shape
        target.inverse_temperature.zero_()
        self.position, self.noise = target.reference.draw(shape[0] * shape[1])
        self.moves = PopulationMoves(target, self.position)
        self.log_weights = self.position.new_zeros(shape, dtype=torch.float64)
        self.log_evidence = self.log_weights[:, :1].clone()
        self.founder = torch.arange(len(self.position), device=self.position.device)
        self.variance_of_steps = 1.0
        self._known: Ends | None = None
        if not bool((self.log_ratio() > -torch.inf).any()):
            raise ValueError(
                "no draw to start from has a posterior density: expected a guide to start from, or "
                "a prior that meets the data"
            )

    @property
    def all_log_weights(self) -> Tensor:
        """Whose exponentials have the evidence as mean."""
        return self.log_weights + self.log_evidence

    def log_ratio(self) -> Tensor:
        """Log densities of the path's end against its start; minus infinity for what is no number.

        Of shape ``(replicates, particles)``.
        """
        ends = self._ends()
        return self._log(ends.start.double() - ends.end.double())

    @property
    def gradient(self) -> Tensor:
        """Of the energy, in the position, at each particle."""
        return self.target.between(self._ends())[1]

    def _ends(self) -> Ends:
        """What lies at the path's ends at all particles."""
        if self._known is None:
            self._known = self.moves.ends(self.position, self.noise)
        return self._known

    def _log(self, increment: Tensor) -> Tensor:
        """What is added to log weights; minus infinity for what is no number."""
        return torch.where(increment.isfinite(), increment, -torch.inf).reshape(self.shape)

    def pass_on(self, rung: Rung, num_moves: int) -> Passage:
        """Takes the population to a temperature: flow, weights, resampling, moves."""
        increments, self.position, self._known = self.reach(rung.inverse_temperature, rung.flow)
        self.target.inverse_temperature.fill_(rung.inverse_temperature)
        alive = float(self.weights[increments.flatten() > -torch.inf].sum())
        worth = alive * conditional_size(self.all_log_weights, increments)
        self.variance_of_steps += 1.0 / max(worth, 1.0 / len(self.position)) - 1.0
        self.log_weights = self.log_weights + increments
        size = effective_size(self.log_weights) / self.shape[1]
        self._resample(size < _DEPLETED)
        moved = self.moves(self.position, self.noise, self._ends(), rung.tuning, num_moves)
        self.position, self.noise, rate = moved
        self._known = None
        acceptance = float((self.weights * rate).sum())
        return Passage(rung.inverse_temperature, float(size.mean()), acceptance)

    def pass_and_learn(self, rung: Rung, num_moves: int) -> Passage:
        """Takes the population to a temperature, and learns step and mass from what it did."""
        passage = self.pass_on(rung, num_moves)
        self.moves.tune_step(passage.acceptance_rate)
        self.moves.tune_mass(self.gradient, self.weights)
        return passage

    def move_on(self, tuning: Tuning, num_moves: int) -> Drift:
        """Moves the population at its temperature, and tells what that changes."""
        weights, before = self.weights, self.log_ratio().flatten()
        moved = self.moves(self.position, self.noise, self._ends(), tuning, num_moves)
        self.position, self.noise, _ = moved
        self._known = None
        after = self.log_ratio().flatten()
        good = before.isfinite() & after.isfinite() & (weights > 0.0)
        if not bool(good.any()):
            return Drift(math.nan, math.nan)
        change = float((weights * (after - before))[good].sum())
        # Few particles in narrow places have a share of the variance, which hides what others do.
        ends = torch.tensor([_TAIL, 1.0 - _TAIL]).to(after)
        spread = float(after[good].quantile(ends).diff()) / _RANGE
        return Drift(change, spread * float((2.0 * weights.square().sum()).sqrt()))

    @torch.no_grad()
    def reach(
        self, inverse_temperature: float, flow: NearIdentity | None
    ) -> tuple[Tensor, Tensor, Ends]:
        """What the population would be at another temperature, before it is resampled and moves.

        Returns:
            What is added to the log weights, ``(replicates, particles)``, positions, and what lies
            at the path's ends there.
        """
        here = self.target.inverse_temperature.double()
        there = torch.full_like(here, inverse_temperature)
        ends = self._ends()
        start, end = ends.start.double(), ends.end.double()
        if flow is None:
            return self._log((there - here) * (start - end)), self.position, ends
        before = start if float(here) == 0.0 else torch.lerp(start, end, here)
        moved, growth = flow(self.position)
        position = moved.to(self.position)
        ends = self.moves.ends(position, self.noise)
        after = torch.lerp(ends.start.double(), ends.end.double(), there)
        return self._log(before - after + growth), position, ends

    @property
    def weights(self) -> Tensor:
        """Of all particles, adding up to one."""
        return normalised(self.all_log_weights.flatten())

    @property
    def log_families(self) -> Tensor:
        """What the descendants of each of the first particles weigh together, in logarithms.

        Their exponentials have the evidence as mean: of shape ``(replicates * particles,)``.
        """
        return sum_by_family(self.all_log_weights.flatten(), self.founder)

    def _resample(self, depleted: Tensor) -> None:
        """Resamples some parts, of shape ``(replicates,)``."""
        if not bool(depleted.any()):
            return
        depleted = depleted[:, None]
        rows, count = self.shape
        same = torch.arange(count, device=depleted.device)
        index = torch.where(depleted, resample_systematically(self.log_weights), same)
        index = (index + count * torch.arange(rows, device=depleted.device)[:, None]).flatten()
        self.position, self.noise = self.position[index], self.noise[index]
        self.founder = self.founder[index]
        self._known = Ends(*(part[index] for part in self._ends()))
        gain = log_mean_exp(self.log_weights)[:, None]
        self.log_evidence = self.log_evidence + torch.where(depleted, gain, 0.0)
        self.log_weights = torch.where(depleted, 0.0, self.log_weights)
