"""The transitions that a run along a learned energy is made of, on one target."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_hamflow.mcmc.adaptation.base import Moves
from pyro_hamflow.mcmc.adaptation.surrogate_engine import SurrogateEngine
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateRun
from pyro_hamflow.mcmc.transitions.base import (
    Block,
    Info,
    Observe,
    ParameterTransition,
    State,
    Transition,
    Tuning,
)
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh, Refresh
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafConditionalTransition, PerLeafTransition
from pyro_hamflow.mcmc.transitions.proposal_set import block_of_one
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity, TrustRegion

DEEPEST = 10  # doublings of a true trajectory that is learned from


class SurrogateMoves:
    """Makes the transitions of a run along a learned energy.

    Arguments:
        potential: The true target.
        run: What was chosen, and how trajectories end.
        num_chains: How many chains.

    Attributes:
        refresh: How the noise of an estimate moves, if there is any.
    """

    def __init__(self, potential: Potential, run: SurrogateRun, num_chains: int) -> None:
        self.potential = potential
        self.choices = run.choices
        self.trajectories = run.hamiltonian.trajectories
        self.num_chains = num_chains
        estimator = run.hamiltonian.estimator
        self.refresh: Refresh = CorrelatedRefresh() if estimator is None else estimator.refresh
        self._true: Transition = self._with_refresh(
            self.trajectories.parameter_transition(potential, num_chains)
        )

    def gathering(self, observe: Observe) -> Transition:
        """Along true gradients, each of which is told to an observer.

        Before a scale is known, only No-U-Turn trajectories go as far as they should.
        """
        inner = NUTSTransition(self.potential, self.num_chains, DEEPEST, observe)
        return self._with_refresh(inner)

    def at_endpoint(
        self, density: SurrogateDensity, engine: SurrogateEngine, num_transitions: int
    ) -> MultipleProposalTransition:
        """Along the surrogate, judged by true energies where its transitions end.

        True gradients are followed by the same engine from here on.
        """
        self._true = engine.truth or self._true
        return MultipleProposalTransition(
            self.potential,
            density,
            engine.make_inner,
            self.num_chains,
            self.refresh,
            Blocks(self.potential),
            num_transitions=num_transitions,
            num_proposals=self.choices.num_proposals,
            energy=engine.energy,
        )

    def per_leaf(self, network: PotentialNetwork) -> Transition:
        """Along the surrogate, judged by the true energy at every point."""
        radius = self.choices.trust_radius * float(network.reach)
        trust = TrustRegion(radius, 1.5 * radius) if math.isfinite(radius) else None
        judged = JudgedDensity(self.potential, network, trust)
        inner = self.trajectories.parameter_transition(judged, self.num_chains)
        leaf = PerLeafTransition(judged, inner)
        if not self.potential.noise_sites:
            return leaf
        return PerLeafConditionalTransition(leaf, self.refresh, Blocks(self.potential))

    def step_along_truth(self, state: State, tuning: Tuning) -> tuple[State, Info]:
        """One transition along true gradients, among those of the surrogate at the endpoint."""
        start = self._true.state_at(state.position, state.noise)
        steps = self.trajectories.draw_num_steps(tuning.step_size)
        moved, info = self._true.step(start, tuning, steps)
        densities = info.n_densities + (1 if state.noise.shape[1] else 0)
        info = info._replace(n_gradients=info.n_gradients + 1, n_densities=densities)
        return moved._replace(gradient=torch.zeros_like(state.position)), info

    def refresh_at(self, position: Tensor, noise: Tensor) -> tuple[Tensor, int]:
        """Refreshes noise with the parameters held at given positions.

        Returns:
            The noise, and how many densities it took.
        """
        evaluate = partial(self.potential.evaluate, position)
        blocks = Blocks(self.potential)
        noise, *_, count = self.refresh(blocks, noise, evaluate(noise), evaluate)
        return noise, count + 1

    def rehearse(self, transition: Transition, state: State, tuning: Tuning) -> None:
        """Makes a step in vain, so that what is captured for it is not part of what is timed."""
        with random_state_kept():
            start = transition.state_at(state.position, state.noise)
            steps = self.trajectories.draw_num_steps(tuning.step_size)
            transition.step(start, tuning, steps)

    def _with_refresh(self, inner: ParameterTransition) -> Transition:
        """A move of the parameters, and of the noise if there is any."""
        if not self.potential.noise_sites:
            return inner
        return ConditionalTransition(inner, self.refresh, Blocks(self.potential))


@dataclass(frozen=True)
class AlongSurrogate:
    """Draws along the surrogate, and along true gradients now and then.

    Arguments:
        along: The moves along the surrogate.
        moves: Has those along true gradients.
        share: Of true ones, for each set of proposals that are judged together.
    """

    along: Moves
    moves: SurrogateMoves
    share: float

    def __call__(self, state: State) -> tuple[State, Info]:
        """Moves all chains once."""
        if self._is_for_truth(state):
            return self.moves.step_along_truth(state, self.along.tuning)
        return self.along(state)

    def many(self, state: State, most: int) -> tuple[State, Block] | None:
        """All draws of a set of proposals; none in the midst of one, or where fewer are wanted."""
        transition, tuning = self.along.transition, self.along.tuning
        if not isinstance(transition, MultipleProposalTransition):
            return None
        count = transition.num_proposals
        if most < count or not transition.is_due(state):
            return None
        if self._is_for_truth(state):
            moved, info = self.moves.step_along_truth(state, tuning)
            return moved, block_of_one(moved, info)
        draw_num_steps = self.along.trajectories.draw_num_steps
        moved, block = transition.block(state, tuning, draw_num_steps(tuning.step_size))
        for _ in range(count - 1):  # as one by one, so that a run repeats itself whatever its calls
            draw_num_steps(tuning.step_size)
        return moved, block

    def _is_for_truth(self, state: State) -> bool:
        """Whether true gradients are followed now: between sets of proposals, at random."""
        transition = self.along.transition
        ended = isinstance(transition, MultipleProposalTransition) and transition.ended(state)
        return ended and float(torch.rand(())) < self.share
