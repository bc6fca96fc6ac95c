"""Populations moved from a density that can be drawn from to the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import Reference, TemperedTarget
from pyro_hamflow.smc.moves import PopulationMoves
from pyro_hamflow.smc.resampling import (
    conditional_size,
    effective_size,
    log_mean_exp,
    normalised,
    resample_systematically,
)

_HALVINGS = 50  # of an interval of temperatures
_SMALLEST = 1e-12  # step of the inverse temperature
_DEPLETED = 0.5  # of the effective size, below which particles are resampled


@dataclass(frozen=True)
class Rung:
    """One temperature of a schedule.

    Attributes:
        inverse_temperature: Between 0 and 1.
        tuning: Step size and mass of the moves there.
    """

    inverse_temperature: float
    tuning: Tuning = field(repr=False)


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
class Population:
    """Weighted draws of a posterior, in parts that have been moved apart from each other.

    Attributes:
        position: On the real line, of shape ``(particles, dimension)``; parts follow each other.
        noise: Of shape ``(particles, noise_dimension)``.
        log_weights: Of shape ``(particles,)``; their exponentials have the evidence as mean.
        gradient: Of the potential in the position, at each particle.
        parts_log_evidence: The estimate of each part, of shape ``(replicates,)``.
        passages: What happened at each temperature.
        tuning: Step size and mass of the moves at the end.
        num_gradients: How many gradients each particle took, those before it included.
    """

    position: Tensor = field(repr=False)
    noise: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    gradient: Tensor = field(repr=False)
    parts_log_evidence: Tensor = field(repr=False)
    passages: list[Passage] = field(repr=False)
    tuning: Tuning = field(repr=False)
    num_gradients: int

    @property
    def log_evidence(self) -> float:
        """The logarithm of the mean weight."""
        return float(log_mean_exp(self.parts_log_evidence))

    @property
    def log_evidence_error(self) -> float:
        """Its standard error, from how much the parts differ."""
        relative = (self.parts_log_evidence - self.log_evidence).exp()
        return float(relative.std()) / math.sqrt(len(relative))


Report = Callable[[Passage], None]


def anneal(
    potential: Potential,
    num_particles: int = 2000,
    *,
    reference: Reference | None = None,
    num_replicates: int = 8,
    conditional_ess: float = 0.97,
    num_moves: int = 2,
    report: Report | None = None,
) -> Population:
    r"""Moves a population along a path of temperatures to the posterior.

    Twice: the first population finds temperatures, step sizes and masses, and is forgotten; the
    second, which starts anew, goes by what the first has found. What a population is moved by must
    not have been learned from itself: masses follow the accidents of a sample, and moves by them
    make its spread too small (measured: the evidence of a mixture in 64 dimensions comes out
    :math:`e^{12}` times too large).

    Arguments:
        potential: The posterior.
        num_particles: How many particles, in all parts together; rounded up to full parts.
        reference: Where the path begins; at the model's prior if not given.
        num_replicates: Into how many parts they fall, that are resampled apart from each other.
        conditional_ess: What the weights of one step are to be worth, as a share of the particles.
        num_moves: How often particles move at each temperature.
        report: Is told of each temperature.

    Raises:
        ValueError: If the prior cannot be drawn from, or no draw has a posterior density.

    Invariant:
        The evidence of the second population has no bias, and weighted means over it are
        consistent.

    References:
        | Sequential Monte Carlo samplers (Del Moral, Doucet, Jasra, 2006)
        | https://doi.org/10.1111/j.1467-9868.2006.00553.x
        | Toward Automatic Model Comparison (Zhou, Johansen, Aston, 2016)
        | https://arxiv.org/abs/1303.3123
    """
    target = TemperedTarget(reference or Prior(potential), potential)
    shape = (num_replicates, -(-num_particles // num_replicates))
    schedule, cost = find_schedule(target, shape, conditional_ess, num_moves, report)
    return follow(target, shape, schedule, num_moves, cost, report)


def find_schedule(
    target: TemperedTarget,
    shape: tuple[int, int],
    conditional_ess: float,
    num_moves: int,
    report: Report | None,
) -> tuple[list[Rung], int]:
    """Temperatures, step sizes and masses, and how many gradients each particle took for them."""
    particles = _Particles(target, shape)
    schedule: list[Rung] = []
    here = 0.0
    while here < 1.0:
        step = _next_step(particles.log_weights, particles.log_ratio(), 1.0 - here, conditional_ess)
        here = min(1.0, here + step)
        schedule.append(Rung(here, particles.moves.tuning))
        passage = particles.pass_on(here, num_moves)
        particles.tune(passage.acceptance_rate)
        if report is not None:
            report(passage)
    return schedule, particles.moves.num_gradients


def follow(
    target: TemperedTarget,
    shape: tuple[int, int],
    schedule: list[Rung],
    num_moves: int,
    cost: int,
    report: Report | None,
) -> Population:
    """A population that nothing is learned from."""
    particles = _Particles(target, shape)
    passages = []
    for rung in schedule:
        particles.moves.tuning = rung.tuning
        passages.append(particles.pass_on(rung.inverse_temperature, num_moves))
        if report is not None:
            report(passages[-1])
    gradient = particles.moves.scores(particles.position, particles.noise)
    return Population(
        particles.position,
        particles.noise,
        particles.all_log_weights.flatten(),
        gradient,
        log_mean_exp(particles.all_log_weights),
        passages,
        schedule[-1].tuning,
        cost + particles.moves.num_gradients,
    )


class _Particles:
    """A population on its way.

    Attributes:
        log_weights: Since particles were resampled, of shape ``(replicates, particles)``.
        log_evidence: Of what has been resampled, of shape ``(replicates, 1)``.
    """

    def __init__(self, target: TemperedTarget, shape: tuple[int, int]) -> None:
        self.target, self.shape = target, shape
        self.position, self.noise = target.reference.draw(shape[0] * shape[1])
        self.moves = PopulationMoves(target, self.position)
        self.log_weights = self.position.new_zeros(shape, dtype=torch.float64)
        self.log_evidence = self.log_weights[:, :1].clone()
        self.here = 0.0
        self._known: Tensor | None = None
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
        if self._known is None:
            rows = self.moves.rows
            parts = zip(self.position.split(rows), self.noise.split(rows), strict=True)
            ends = [self.target.ends(*some) for some in parts]
            value = torch.cat([start.double() - end.double() for start, end in ends])
            value = torch.where(value.isfinite(), value, -torch.inf)
            self._known = value.reshape(self.shape)
        return self._known

    def pass_on(self, inverse_temperature: float, num_moves: int) -> Passage:
        """Takes the population to a temperature: weights, resampling, moves."""
        step = inverse_temperature - self.here
        self.here = inverse_temperature
        self.target.inverse_temperature.fill_(inverse_temperature)
        self.log_weights = self.log_weights + step * self.log_ratio()
        size = effective_size(self.log_weights) / self.shape[1]
        self._resample(size < _DEPLETED)
        moved = self.moves(self.position, self.noise, num_moves)
        self.position, self.noise, rate = moved
        self._known = None
        acceptance = float((self.weights * rate).sum())
        return Passage(inverse_temperature, float(size.mean()), acceptance)

    @property
    def weights(self) -> Tensor:
        """Of all particles, adding up to one."""
        return normalised(self.all_log_weights.flatten())

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
        gain = log_mean_exp(self.log_weights)[:, None]
        self.log_evidence = self.log_evidence + torch.where(depleted, gain, 0.0)
        self.log_weights = torch.where(depleted, 0.0, self.log_weights)

    def tune(self, acceptance: float) -> None:
        """Step size and mass of the next moves, by what has been seen of the last."""
        self.moves.tune_step(acceptance)
        self.moves.tune_mass(self.moves.scores(self.position, self.noise), self.weights)


def _next_step(log_weights: Tensor, log_ratio: Tensor, most: float, share: float) -> float:
    """How far to go on the path so that the step's weights are worth a share of the particles."""
    if conditional_size(log_weights, most * log_ratio) >= share:
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = conditional_size(log_weights, middle * log_ratio) >= share
        low, high = (middle, high) if enough else (low, middle)
    return max(low, _SMALLEST)
