"""Jumps from a flow beside local moves: how they are found before draws are kept, and phases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from pyro_hamflow.flows.fit import TrainableGuide
from pyro_hamflow.flows.modes import Mode, beside
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.adaptation.flow_training import FlowTraining, can_learn
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.scattered import leaves_open
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.adaptation.walkers import MOST_STEPS, Jumps, Walkers
from pyro_hamflow.mcmc.transitions.base import Transition, Tuning
from pyro_hamflow.mcmc.transitions.in_blocks import InBlocks
from pyro_hamflow.mcmc.transitions.independence import IndependenceTransition, Proposals
from pyro_hamflow.mcmc.transitions.native import NativeMoves
from pyro_hamflow.mcmc.transitions.native_cycle import beside_jumps
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.compilation import seconds_of
from pyro_hamflow.smc.annealing import Population, anneal
from pyro_hamflow.smc.machine import machine_gradient
from pyro_hamflow.smc.resampling import resample_shuffled
from pyro_hamflow.smc.shown import shown
from pyro_hamflow.smc.verdict import describe_few, describe_missed

_WALKERS = 1000  # that explore
_FIRST, _HASTE = 250, 0.5  # particles that look first, and what their steps' weights are worth
_FEW, _MANY = 500, 2000  # particles that look then, at least and if they take no longer
_LONGEST, _GRADIENTS = 60.0, 500  # seconds than this; and gradients that each takes, mostly
_TRIED = 4  # draws of a trained flow, of which each walker is one
_SLOW = 0.7  # autocorrelation of local moves from which on jumps may pay
_GAIN = 1.5  # in independent draws for which they are worth their time
_LEAST = 1e-3  # of a draw, that one is worth where it cannot be told
_FEW_REMOTE = 0.005  # of walkers, as there are in the tails of any flow
_LOW = 0.05  # acceptance, below which jumps are rare
_MANY_CUT = 0.05  # of local moves, that are shorter than they would be
_NO_JUMPS = Jumps(0, 0.0, 0.0, suffices=False)


@dataclass(frozen=True)
class FlowChoices:
    """What the user chose of jumps.

    Attributes:
        flow: What makes them; built for the population if not given.
        adapt_flow: Whether it is trained before draws are kept, if it can be.
        num_proposals: How many proposals are made for each; found if not given.
        num_particles: How many particles are moved from the prior to the posterior; by what a
            gradient takes if not given.
    """

    flow: DensityGuide | None
    adapt_flow: bool
    num_proposals: int | None
    num_particles: int | None

    @property
    def learns(self) -> bool:
        """Whether the flow is trained on a population from the prior."""
        return self.flow is None or (self.adapt_flow and can_learn(self.flow))


class Found(NamedTuple):
    """What a search has found.

    Attributes:
        position: Draws about from the posterior, of shape ``(walkers, dimension)``.
        noise: Their noise.
        tuning: Step size and mass of the local move.
        guide: What makes jumps; nothing where they do not pay.
        jumps: How they go.
        num_steps: How many steps local moves took, of each walker or of all alike.
    """

    position: Tensor
    noise: Tensor
    tuning: Tuning
    guide: DensityGuide | None
    jumps: Jumps
    num_steps: Tensor


class FlowSearch:
    """Looks for the posterior's modes, and for a flow that jumps between them.

    Arguments:
        choices: What the user chose.
        potential: The target.
        hamiltonian: How the local move's trajectories end, and what is tuned of them.
        make_transition: Makes the local move.
        plan: What the run is to be; is told what the user should know.
        machine: Value and gradient by machine code, where the run has compiled it anyway.
    """

    def __init__(
        self,
        choices: FlowChoices,
        potential: Potential,
        hamiltonian: Hamiltonian,
        make_transition: Callable[[Potential, Tensor], Transition],
        plan: RunPlan,
        machine: Program | None = None,
    ) -> None:
        self.machine = machine
        self.choices = choices
        self.potential = potential
        self.hamiltonian = hamiltonian
        self.make_transition = make_transition
        self.plan = plan

    def run(self) -> Found:
        """Finds a population, tunes the local move on it, and trains the flow on where it goes.

        A few particles in haste tell whether that is worth it.
        """
        first = self._hasty_population() if self.choices.learns else self._drawn()
        walkers = self._walkers(first)
        persistence = walkers.persistence()
        modes: list[Mode] = []
        slow = persistence >= _SLOW
        if isinstance(first, Population) and (slow or leaves_open(first, walkers, _SLOW)):
            population = self._population(first)
            modes = [*first.found, *beside(first.found, population.found)]
            walkers = self._walkers(population)
            persistence = max(persistence, walkers.persistence())
        guide, jumps = None, _NO_JUMPS
        if persistence < _SLOW:
            self.plan.say(
                "local moves alone forget where they were within a few draws, so that jumps would "
                "not pay: draws are made without them."
            )
        else:
            training = FlowTraining(self.potential, walkers, modes)
            guide = self.choices.flow
            if guide is None:
                guide = training.built()
            elif self.choices.learns:
                training.given(cast(TrainableGuide, guide))
            jumps = walkers.jumps(guide)
            if gain(persistence, jumps.acceptance_rate) < _GAIN:
                self.plan.say(
                    f"only {jumps.acceptance_rate:.1%} of the flow's jumps would be accepted, too "
                    "few for what they cost: draws are made without them."
                )
                guide = None
            else:
                self._tell(jumps, walkers.num_steps)
        state = walkers.state
        return Found(state.position, state.noise, walkers.tuning, guide, jumps, walkers.num_steps)

    def _tell(self, jumps: Jumps, num_steps: Tensor) -> None:
        cut = float((num_steps >= MOST_STEPS).double().mean())
        if jumps.suffices and cut > _MANY_CUT:
            self.plan.say(
                f"{cut:.0%} of the local moves would take more than {MOST_STEPS} steps, as where "
                "the step size has to suit a part much narrower than others: they end there, for "
                "jumps lead further."
            )
        if jumps.remote > _FEW_REMOTE:
            self.plan.say(
                f"{jumps.remote:.1%} of the population's draws lie where the flow has next to no "
                "density, so that jumps hardly ever lead there: the shares of the draws there need "
                "not be right; take more particles, or a flow that covers more."
            )
        if jumps.acceptance_rate < _LOW:
            self.plan.say(
                f"only {jumps.acceptance_rate:.1%} of the flow's jumps are accepted: the shares of "
                "modes converge slowly; draw more, take more particles, or another flow."
            )

    # --- the population -------------------------------------------------------------------------

    def _hasty_population(self) -> Population:
        count = min(self.choices.num_particles or _FIRST, _FIRST)
        return anneal(
            self.potential,
            count,
            conditional_ess=_HASTE,
            num_moves=1,
            only_first=True,
            machine=self.machine,
        )

    def _population(self, first: Population) -> Population:
        count = self.choices.num_particles or self._affordable()
        machine = self.machine or machine_gradient(self.potential, count)
        with shown(hidden=self.plan.hidden) as report:
            population = anneal(
                self.potential, count, modes=first.modes, machine=machine, report=report
            )
        for said in (describe_missed(population.num_missed), describe_few(population)):
            if said is not None:
                self.plan.say(said)
        return population

    def _affordable(self) -> int:
        """How many particles a population has where that was left open.

        By an estimate of what their gradients take, and not by a clock, so that runs are repeated.
        """
        programs = self.potential.programs
        graph, rows = programs.base("gradient"), programs.rows_at_once("gradient", _MANY)
        if graph is None:
            return _MANY
        each = seconds_of(graph, rows) / rows
        count = min(max(int(_LONGEST / (_GRADIENTS * each)), _FEW), _MANY)
        if count < _MANY:
            self.plan.say(
                f"a gradient takes about {1e3 * each:.2g} milliseconds, so that {count} particles "
                f"instead of {_MANY} looked for modes: take more, by `num_particles`, if small "
                "modes matter."
            )
        return count

    @torch.no_grad()
    def _drawn(self) -> Proposals:
        """Draws of a trained flow, with their importance weights."""
        guide = cast(DensityGuide, self.choices.flow)
        drawn = IndependenceTransition(self.potential, guide).propose(_TRIED * _WALKERS)
        if not bool((drawn.log_weights > -torch.inf).any()):
            raise ValueError(
                f"`flow` drew no point of finite density in {len(drawn.position)} tries: expected "
                "one that meets the posterior"
            )
        return drawn

    def _walkers(self, population: Population | Proposals) -> Walkers:
        """Walkers that start from a population, as many as it is of at most, their moves tuned."""
        potential, step_and_mass = self.potential, self.hamiltonian.step_and_mass
        picked = resample_shuffled(population.log_weights, min(len(population.position), _WALKERS))
        position, noise = population.position[picked], population.noise[picked]
        kinetic = step_and_mass.first_kinetic(potential)
        if step_and_mass.adapt_mass_matrix and step_and_mass.inverse_mass_matrix is None:
            if isinstance(population, Population):
                spread = population.tuning.kinetic.inverse_mass
            else:
                spread = torch.cov(position.double().mT).reshape(2 * (potential.dimension,))
            if kinetic.is_dense and spread.dim() == 1:
                spread = spread.diag()
            kinetic = step_and_mass.kinetic_by(potential, spread.to(potential.example), kinetic)
        rows = potential.programs.rows_at_once("gradient", len(position))
        transition = self.make_transition(potential, position[:rows])
        if rows < len(position) and not isinstance(transition, NativeMoves):
            transition = InBlocks(transition, rows)
        walkers = Walkers(potential, self.hamiltonian, transition, position, noise, kinetic)
        walkers.warm_up()
        return walkers


def gain(persistence: float, rate: float) -> float:
    """How many times as many independent draws jumps make of as many moves.

    Arguments:
        persistence: The autocorrelation of one local move.
        rate: The acceptance of a jump, which leads anywhere.

    Example:
        >>> gain(0.0, 0.9), gain(0.5, 0.5), gain(0.99, 0.0)
        (1.0, 1.8, 1.0)
    """
    alone, beside = persistence, persistence * (1.0 - rate)
    return (1.0 + alone) / max(1.0 - alone, _LEAST) * (1.0 - beside) / (1.0 + beside)


class TuneBesideJumps(Tune):
    """Tunes the local move; then draws by cycles of it and of jumps.

    Arguments:
        args: As :class:`~pyro_hamflow.mcmc.adaptation.tune.Tune` has them.
        guide: What makes jumps; without one, draws are made by the local move.
        num_proposals: How many proposals are made for each.
        asked: Whether the user asked for machine code.
    """

    def __init__(
        self, *args: Any, guide: DensityGuide | None, num_proposals: int, asked: bool
    ) -> None:
        super().__init__(*args)
        self.asked = asked
        self.guide = guide
        self.num_proposals = num_proposals
        self.is_local = guide is None

    def final_transition(self) -> Transition:
        local, plan = self.transition, self.plan
        if self.guide is None:
            return local
        target, say = cast(Potential, local.target), plan.say if self.asked else None
        return beside_jumps(local, target, self.guide, self.num_proposals, plan.num_draws, say)
