"""Phases that learn a map of the parameters while a run warms up.

The map is fitted to gradients of the chains' trajectories: along plain ones first, then along those
in the coordinates of the map so far, which lead further; by an optimiser unless least squares leave
nothing to gain. After the last fit it is frozen, or dropped where plain coordinates are as good.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.flows.fisher import (
    FIRST_RATE,
    LATER_RATE,
    fit_transport,
    mean_divergence,
    whitened,
    worst_divergence,
)
from pyro_hamflow.flows.transport_flow import TransportFlow
from pyro_hamflow.flows.transport_start import begin
from pyro_hamflow.flows.transport_tails import Outskirts
from pyro_hamflow.mcmc.adaptation.base import Phase, RunPlan
from pyro_hamflow.mcmc.adaptation.hamiltonian import Hamiltonian
from pyro_hamflow.mcmc.adaptation.metric import inverse_mass_of
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.transitions.base import Info, State
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.sites import Site
from pyro_hamflow.model.transported import TransportedPart, TransportedTarget, pulled_back
from pyro_hamflow.networks.training import Training
from pyro_hamflow.surrogates.gradient_log import GradientLog, LeapfrogSettings

_REFITS = (0.16, 0.28, 0.4, 0.6)  # after which shares of warm-up a map is fitted
_STEPS, _LAST_STEPS = 200, 400  # of the optimiser, in each fit and in the last
_MOST_POINTS = 10_000  # that are learned from
_MOST_DIMENSIONS = 1000  # in which the linear parts of layers are some million numbers
_FEWEST_WARMUP = 50  # iterations
# The divergence of the worst plain coordinate, below which all are about normal: a logistic
# regression at .11 gained nothing, eight schools without a funnel at .73 two and a half times.
_NORMAL = 0.15
# That of the worst coordinate, below which steps of the optimiser only add their noise.
_STRAIGHT = 0.05
_WORTH = 0.5  # of the divergence in plain coordinates, below which a map's has to be


def parameters_of(potential: Potential) -> Tensor:
    """The coordinates that a map moves: those that are no noise of an estimate."""
    parts = [torch.arange(site.start, site.stop) for site in _sites(potential)]
    return torch.cat(parts or [torch.arange(0)]).to(potential.example.device)


def _sites(potential: Potential) -> list[Site]:
    nodes = potential.plain_trace.nodes
    return [s for s in potential.sites if not nodes[s.name]["infer"].get("noise", False)]


class TransportLearning:
    """What the phases of a run that learns a map know, and which follows which.

    Arguments:
        potential: The target.
        hamiltonian: How trajectories end, and what is tuned of them.
        plan: What the run is to be.

    Attributes:
        log: What trajectories have found.
        iteration: How many iterations were made.
        trainings: How the fits went.
        learned: The divergence in the map's coordinates, at points held out of the latest fit.
        plain: That in plain coordinates.
        worst: That of the worst of them alone.
    """

    def __init__(self, potential: Potential, hamiltonian: Hamiltonian, plan: RunPlan) -> None:
        self.potential, self.hamiltonian, self.plan = potential, hamiltonian, plan
        self.log = GradientLog()
        self.iteration = 0
        self.trainings: list[Training] = []
        self.learned = self.plain = self.worst = math.inf
        self.refits = [math.ceil(share * plan.warmup_steps) for share in _REFITS]
        self._parameters = parameters_of(potential)
        self._sizes = [site.stop - site.start for site in _sites(potential)]
        self._flow: TransportFlow | None = None
        self._target: TransportedTarget | None = None
        self._kinetic: GaussianKinetic | None = None
        self._known = 0
        self._outskirts = Outskirts()

    # --- what follows what ------------------------------------------------------------------------

    def first_phase(self, position: Tensor, noise: Tensor) -> tuple[Phase, State]:
        """Plain moves that are observed; or not, where nothing can be learned."""
        reason = self._hopeless()
        if reason is not None:
            return self._give_up(position, noise, reason)
        return self._follow(None, position, noise)

    def _hopeless(self) -> str | None:
        """Why no map can be learned, in words, if that is so."""
        count, steps = len(self._parameters), self.plan.warmup_steps
        if not 0 < count <= _MOST_DIMENSIONS:
            return f"there are {count} parameters, and maps are learned of 1 to {_MOST_DIMENSIONS}"
        if steps < _FEWEST_WARMUP:
            return f"maps are learned in {_FEWEST_WARMUP} iterations of warm-up or more"
        return None

    def _follow(
        self,
        target: TransportedTarget | None,
        position: Tensor,
        noise: Tensor,
        kinetic: GaussianKinetic | None = None,
    ) -> tuple[Phase, State]:
        """Moves in a target's coordinates, or plain ones; observed while a fit is to come."""
        last, plan = not self.refits, self.plan
        until, most = plan.warmup_steps if last else self.refits[0], plan.most_warmup_steps
        plan = replace(
            plan,
            before=self.iteration,
            warmup_steps=until - self.iteration,
            most_warmup_steps=None if most is None else most - self.iteration,
        )
        self._target = target
        moves = self.hamiltonian.trajectories.parameter_transition(
            target or self.potential, len(position), None if last else self.log.observe
        )
        return self.hamiltonian.first_phase(
            self.potential,
            moves,
            plan,
            position if target is None else target.coordinates(position),
            noise,
            kinetic=kinetic,
            phase=Tune if last else partial(Learn, learning=self),
            may_go_on=last,
        )

    def refit(self, state: State) -> tuple[Phase, State]:
        """Fits the map to all that is known, and follows it; drops it if the last fit is poor."""
        self.refits.pop(0)
        target, position = self._target, state.position
        if target is not None:
            position = target.positions(position)[0]
        self._move_entries()
        try:
            target = self._fit(state.noise)
            reason = None if self.refits else self._objection()
        except (ValueError, torch.linalg.LinAlgError) as error:
            reason = f"nothing could be learned: {error}"
        if self.refits:
            return self._follow(target, position, state.noise)
        self.log.entries.clear()
        if reason is not None:
            return self._give_up(position, state.noise, reason)
        return self._follow(target, position, state.noise)

    def _give_up(self, position: Tensor, noise: Tensor, reason: str) -> tuple[Phase, State]:
        self.refits.clear()
        self.plan.say(f"no map is followed: {reason}.")
        return self._follow(None, position, noise, self._kinetic)

    # --- what is learned --------------------------------------------------------------------------

    def _move_entries(self) -> None:
        """Brings what was found in a map's coordinates to the model's own."""
        entries, target = self.log.entries[self._known :], self._target
        if target is not None and entries:
            z, slope = (torch.cat(part) for part in zip(*(e[0:3:2] for e in entries), strict=True))
            with torch.no_grad():
                x, log_volume = target.transport.forward(z)
            _, gradient = pulled_back(target.transport.inverse, x, lambda _: slope)
            rows = len(entries[0].value)
            parts = zip(x.split(rows), log_volume.split(rows), gradient.split(rows), strict=True)
            self.log.entries[self._known :] = [
                entry._replace(position=x, value=entry.value + log_volume, gradient=gradient)
                for entry, (x, log_volume, gradient) in zip(entries, parts, strict=True)
            ]
        self._known = len(self.log.entries)

    def _fit(self, noise: Tensor) -> TransportedTarget:
        """A target in the coordinates of a map that fits what is known.

        Raises:
            ValueError: If too little is known.
        """
        potential, moved = self.potential, self._parameters
        points, held_out = self.log.points(_MOST_POINTS)
        if held_out is None:
            raise ValueError("too few gradients were found")
        x, g = points.position[:, moved], points.gradient[:, moved]
        spread, change = (torch.cov(part[~held_out].mT.double()) for part in (x, g))
        ones, count = torch.ones_like(x[0]), len(x)
        spread = torch.atleast_2d(spread)
        change = torch.atleast_2d(change)
        dense = inverse_mass_of(spread, change, count, torch.diag(ones))
        z, slope = whitened(x, g, dense)
        self.plain = mean_divergence((z, slope), held_out)
        self.worst = worst_divergence((z, slope), held_out)
        if len(moved) == potential.dimension:
            step_and_mass = self.hamiltonian.step_and_mass
            like = step_and_mass.first_kinetic(potential)
            self._kinetic = step_and_mass.kinetic_by(potential, dense, like)
        scale = inverse_mass_of(spread.diag(), change.diag(), count, ones)
        fresh = TransportFlow(self._sizes).to(x)
        fresh.loc.copy_(x.mean(0) - scale * g.mean(0))
        fresh.scale.copy_(scale.sqrt())
        everything = self._outskirts.beside(x, g, held_out)
        begin(fresh, *everything, seen=len(x))
        steps = _STEPS if self.refits else _LAST_STEPS
        if worst_divergence(fresh.pull(x, g), held_out) < _STRAIGHT:
            flow, steps = fresh, 0
        else:
            # A prior set by all that is known leads further down than one that few points gave.
            known = [fresh] if self._flow is None or fresh.is_settled else [fresh, self._flow]
            flow = min(
                known, key=lambda flow: mean_divergence(flow.pull(*everything[:2]), everything[2])
            )
        self._flow = flow.requires_grad_(True)
        training = fit_transport(
            flow,
            *everything,
            num_steps=steps,
            learning_rate=FIRST_RATE if flow is fresh else LATER_RATE,
        )
        self.trainings.append(training)
        frozen = copy.deepcopy(flow).requires_grad_(False)
        self.learned = mean_divergence(frozen.pull(x, g), held_out)
        if self.refits:
            self._outskirts.explore(frozen, points.position, moved, potential.gradients, noise)
        if len(moved) == potential.dimension:
            return TransportedTarget(potential, frozen)
        part = TransportedPart(frozen, moved, potential.dimension)
        return TransportedTarget(potential, part)

    def _objection(self) -> str | None:
        """Why plain coordinates are as good as the map's, if they are."""
        learned, plain = self.learned, self.plain
        if self.worst < _NORMAL:
            return f"the posterior is about normal (divergence {plain:.2g})"
        if not learned < _WORTH * plain:
            return (
                f"the one that was learned is hardly nearer to a normal density (divergence "
                f"{learned:.2g}) than plain coordinates are ({plain:.2g})"
            )
        return None


class Learn(Tune):
    """Tunes along short trajectories, whose gradients are kept, until the map is fitted to them.

    Arguments are those of :class:`~pyro_hamflow.mcmc.adaptation.tune.Tune`, and ``learning``.
    """

    def __init__(self, *arguments: Any, learning: TransportLearning) -> None:
        super().__init__(*arguments)
        self.learning = learning

    @property
    def adapting(self) -> bool:
        return True

    @property
    def remaining(self) -> int:
        """Iterations that are to come, those of later phases included."""
        return self.learning.plan.warmup_steps - self.learning.iteration

    @property
    def is_opening(self) -> bool:
        return True

    def advance(self, state: State) -> tuple[State, Info]:
        learning = self.learning
        learning.iteration += 1
        sizes = self.tuning.step_sizes(state.position)
        learning.log.motion = LeapfrogSettings(sizes, self.tuning.kinetic.inverse_mass)
        return super().advance(state)

    def restart(self, state: State) -> None:
        """Begins the search for the step size anew; its trial steps teach nothing."""
        entries = self.learning.log.entries
        known = len(entries)
        super().restart(state)
        del entries[known:]

    def _tell(self, state: State) -> None:
        """Nothing: warm-up goes on."""

    def successor(self, state: State) -> tuple[Phase, State] | None:
        learning = self.learning
        return learning.refit(state) if learning.iteration >= learning.refits[0] else None
