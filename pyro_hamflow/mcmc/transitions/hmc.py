"""Hamiltonian Monte Carlo, all chains at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import leapfrog_step
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    Observe,
    State,
    Tuning,
    draw_level,
    metropolis,
    select,
)
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import Program


class HMCTransition:
    """Moves parameters along leapfrog trajectories, the noise of a likelihood estimate held.

    Arguments:
        target: The target.
        num_chains: How many chains.
        observe: Is told of all steps.

    Invariant:
        The density exp(-U(z, u)) of the positions at their noise, exactly.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901
    """

    def __init__(self, target: Target, num_chains: int, observe: Observe | None = None) -> None:
        self.target = target
        self.num_chains = num_chains
        self._observe = observe
        self._gradient = target.graph("gradient", num_chains)

    def begin(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self._gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        inverse_mass = tuning.kinetic.inverse_mass
        size = tuning.step_sizes(state.position)[:, None]
        momentum = tuning.kinetic.sample(self.num_chains)
        level = draw_level(self.num_chains, momentum.device)
        z, r, value, slope = state.position, momentum, state.evaluation.value, state.gradient
        advance = self._advance(inverse_mass)
        for step in range(num_steps):
            z, r, value, slope = advance(z, r, slope, state.noise, inverse_mass, size)
            if self._observe is not None:
                all_chains = torch.ones_like(value, dtype=torch.bool)
                self._observe(z, value, slope, all_chains, all_chains & (step == 0))
        old = (state.position, momentum, state.evaluation.value, state.gradient)
        inputs = (z, r, value, slope, *old, inverse_mass, level)
        conclude = self.target.accelerate("leapfrog test", _conclude, *inputs)
        position, value, slope, accepted, rate, error, diverging, energy = conclude(*inputs)
        info = Info(
            accepted,
            rate,
            error,
            diverging,
            energy,
            num_steps,
            n_gradients=num_steps,
            n_densities=0,
        )
        return State(position, state.noise, slope, Evaluation(value, {}, {})), info

    def refreshed(self, state: State, tuning: Tuning) -> State:
        """The state with potential and gradient computed anew, after its noise has changed.

        A leapfrog step of size zero does it, so that one program serves for all gradients.
        """
        still = torch.zeros_like(state.position)
        size = still[:, :1]
        inverse_mass = tuning.kinetic.inverse_mass
        _, _, value, slope = self._advance(inverse_mass)(
            state.position, still, still, state.noise, inverse_mass, size
        )
        return state._replace(gradient=slope, evaluation=state.evaluation._replace(value=value))

    def _advance(self, inverse_mass: Tensor) -> Program:
        """The leapfrog step as one program."""

        def advance(*inputs: Tensor) -> tuple[Tensor, ...]:
            return leapfrog_step(self._gradient, *inputs)

        position, noise = self.target.vectors(self.num_chains)
        size = position.new_ones(len(position), 1)
        examples = (position, position, position, noise, inverse_mass, size)
        return self.target.accelerate("leapfrog", advance, *examples)


def _conclude(
    z: Tensor,
    r: Tensor,
    value: Tensor,
    slope: Tensor,
    position: Tensor,
    momentum: Tensor,
    old_value: Tensor,
    old_slope: Tensor,
    inverse_mass: Tensor,
    level: Tensor,
) -> tuple[Tensor, ...]:
    """The Metropolis test at a trajectory's end: the new state, the decision, the energy."""
    kinetic = GaussianKinetic(inverse_mass)
    before, after = kinetic.energy(momentum).double(), kinetic.energy(r).double()
    gain = value.double() - old_value.double()
    decision = metropolis(gain + (after - before), level)
    accepted = decision.accepted
    kept = select(accepted, value, old_value)
    energy = kept.double() + torch.where(accepted, after, before)
    moved = (select(accepted, z, position), kept, select(accepted, slope, old_slope))
    return *moved, *decision, energy
