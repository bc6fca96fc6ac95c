"""Populations moved from a density that can be drawn from to the posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.flows.modes import Mode, beside
from pyro_hamflow.mcmc.transitions.base import Tuning
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.prior import Prior
from pyro_hamflow.model.tempered import Reference, TemperedTarget
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.smc.discovery import beginning_at, look_for_modes
from pyro_hamflow.smc.lineages import MANY, Lineages, error_of_logarithms, lineages_of
from pyro_hamflow.smc.particles import Drift, Particles, Passage, Rung
from pyro_hamflow.smc.resampling import log_mean_exp, next_step
from pyro_hamflow.smc.transport import AFT, CRAFT, flow_at, flow_to, train_in_passes

_REMEMBERED = 8  # particles at a temperature, of which one is
_ACCEPTED, _TRIES = 0.2, 4  # moves at a temperature, below which they are tried anew, so often


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
        drift: What changed as the population moved on at the end, if it did.
        modes: Those that the path began at beside the prior; none if a population from the prior
            alone was found to have them all.
        num_missed: How many of these the first population had next to nothing of, but for luck.
        found: Those, and the modes that descents have found of those that matter.
        lineages: From how many of the first particles it descends.
    """

    position: Tensor = field(repr=False)
    noise: Tensor = field(repr=False)
    log_weights: Tensor = field(repr=False)
    gradient: Tensor = field(repr=False)
    parts_log_evidence: Tensor = field(repr=False)
    passages: list[Passage] = field(repr=False)
    tuning: Tuning = field(repr=False)
    num_gradients: int
    drift: Drift | None = None
    modes: list[Mode] = field(default_factory=list, repr=False)
    num_missed: int = 0
    found: list[Mode] = field(default_factory=list, repr=False)
    lineages: Lineages = MANY

    @property
    def log_evidence(self) -> float:
        """The logarithm of the mean weight."""
        return float(log_mean_exp(self.parts_log_evidence))

    @property
    def log_evidence_error(self) -> float:
        """Its standard error, from how much the parts differ, and a drift where there is one.

        Parts that all miss the same agree, more or less: where particles descend from few, the
        error is what these tell, or parts' logarithms, if that is more.
        """
        relative = (self.parts_log_evidence - self.log_evidence).exp()
        error = float(relative.std()) / math.sqrt(len(relative))
        if self.lineages.are_few:
            of_logarithms = error_of_logarithms(self.parts_log_evidence)
            error = max(error, self.lineages.error, of_logarithms)
        if self.drift is None or not self.drift.matters:
            return error
        return math.hypot(error, self.drift.change)


Report = Callable[[Passage], None]


def anneal(
    potential: Potential,
    num_particles: int = 2000,
    *,
    reference: Reference | None = None,
    modes: Sequence[Mode] = (),
    num_replicates: int = 8,
    conditional_ess: float = 0.97,
    num_moves: int = 2,
    transport: AFT | CRAFT | None = None,
    moves_on: bool = False,
    only_first: bool = False,
    machine: Program | None = None,
    report: Report | None = None,
) -> Population:
    r"""Moves a population along a path of temperatures to the posterior.

    Twice: the first population finds temperatures, step sizes and masses, and is forgotten; the
    second, which starts anew, goes by what the first has found. If descents find modes that the
    first has missed, or descends from few to have found, the path begins at these, too, and the
    first is repeated. What a population is
    moved by must not have been learned from itself: masses follow the accidents of a sample, and
    moves by them make its spread too small (measured: the evidence of a mixture in 64 dimensions
    comes out :math:`e^{12}` times too large).

    Arguments:
        potential: The posterior.
        num_particles: How many particles, in all parts together; rounded up to full parts.
        reference: Where the path begins; at the model's prior if not given, and then at modes of
            which the first population's shares are wrong, too.
        modes: Those that are known.
        num_replicates: Into how many parts they fall, that are resampled apart from each other.
        conditional_ess: What the weights of one step are to be worth, as a share of the particles.
        num_moves: How often particles move at each temperature.
        transport: The flows that carry particles from one temperature to the next, if any do.
        moves_on: Whether the population moves on at the end, half as often as until then, so that a
            drift shows whether it had arrived.
        only_first: Whether the first population will do, to look around.
        machine: The posterior's value and gradient for any number of particles, by machine code,
            where there is any.
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
    shape = (num_replicates, -(-num_particles // num_replicates))

    def find(start: Reference) -> Course:
        target = TemperedTarget(start, potential, machine)
        return find_schedule(target, shape, conditional_ess, num_moves, transport, report)

    num_missed, found = 0, list(modes)
    if reference is not None:
        course = find(reference)
        cost = course.num_gradients
    else:
        prior = Prior(potential)
        course = find(beginning_at(modes, prior))
        cost = course.num_gradients
        seen = (*course.end, course.visited, cost)
        wanted, num_missed, large = look_for_modes(
            potential, *seen, machine, of_few=lineages_of(course.particles).are_few
        )
        found += beside(modes, large)
        others = beside(modes, wanted)
        if others:
            modes = [*modes, *others]
            course = find(beginning_at(modes, prior))
            cost += course.num_gradients
    if only_first:
        before = cost - course.num_gradients
        population = _population(course.particles, course.schedule, [], before)
    else:
        schedule, target = course.schedule, course.particles.target
        if isinstance(transport, CRAFT):
            schedule = train_in_passes(transport, target, schedule, num_moves)
        population = follow(target, shape, schedule, num_moves, cost, report, moves_on=moves_on)
    return replace(population, modes=list(modes), num_missed=num_missed, found=found)


class Course(NamedTuple):
    """A first population's way.

    Attributes:
        schedule: What a second one may go by.
        particles: The population at its end.
        visited: Where some of it was on the way, of shape ``(positions, dimension)``.
    """

    schedule: list[Rung]
    particles: Particles
    visited: Tensor

    @property
    def num_gradients(self) -> int:
        """How many gradients each particle took."""
        return self.particles.moves.num_gradients

    @property
    def end(self) -> tuple[Tensor, Tensor]:
        """The particles' positions, and the logarithms of their weights, parts first."""
        return self.particles.position, self.particles.all_log_weights


def find_schedule(
    target: TemperedTarget,
    shape: tuple[int, int],
    conditional_ess: float,
    num_moves: int,
    transport: AFT | CRAFT | None,
    report: Report | None,
) -> Course:
    """Temperatures, step sizes, masses and flows, learned from a population as it goes.

    Where hardly a move is accepted, as may be at first, moves are tried anew by what that has
    taught, so that the second population never goes by steps that are known to be too long.
    Flows of :class:`CRAFT` are not trained.
    """
    particles = Particles(target, shape)
    schedule: list[Rung] = []
    visited: list[Tensor] = []
    here = 0.0
    while here < 1.0:
        step = next_step(particles.log_weights, particles.log_ratio(), 1.0 - here, conditional_ess)
        here = min(1.0, here + step)
        flow = None
        if isinstance(transport, AFT):
            flow = flow_to(transport, here, particles)
        elif transport is not None:
            flow = flow_at(transport, particles)
        visited.append(particles.position[len(visited) % _REMEMBERED :: _REMEMBERED])
        rung = Rung(here, particles.moves.tuning, flow)
        passage = particles.pass_and_learn(rung, num_moves)
        for _ in range(_TRIES):  # by the step and mass just learned; flows have carried it
            if passage.acceptance_rate >= _ACCEPTED:
                break
            rung = Rung(here, particles.moves.tuning)
            passage = particles.pass_and_learn(rung, num_moves)
        schedule.append(Rung(here, rung.tuning, flow))
        if report is not None:
            report(passage)
    return Course(schedule, particles, torch.cat(visited))


def follow(
    target: TemperedTarget,
    shape: tuple[int, int],
    schedule: list[Rung],
    num_moves: int,
    cost: int,
    report: Report | None,
    *,
    moves_on: bool,
) -> Population:
    """A population that nothing is learned from."""
    particles = Particles(target, shape)
    passages = []
    for rung in schedule:
        passages.append(particles.pass_on(rung, num_moves))
        if report is not None:
            report(passages[-1])
    drift = None
    if moves_on:
        further = max(1, len(schedule) * num_moves // 2)
        drift = particles.move_on(schedule[-1].tuning, further)
    return replace(_population(particles, schedule, passages, cost), drift=drift)


def _population(
    particles: Particles, schedule: list[Rung], passages: list[Passage], cost: int
) -> Population:
    """Particles at the end of a schedule, and how many gradients each took beside its own."""
    log_weights, gradient = particles.all_log_weights, particles.gradient
    return Population(
        particles.position,
        particles.noise,
        log_weights.flatten(),
        gradient,
        log_mean_exp(log_weights),
        passages,
        schedule[-1].tuning,
        cost + particles.moves.num_gradients,
        lineages=lineages_of(particles),
    )
