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
    draw_uniform,
    metropolis,
    select,
)
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.made import Made


class HMCTransition(Made):
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
        self._value_and_gradient = target.graph("gradient", num_chains)

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self._value_and_gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        inverse_mass = tuning.kinetic.inverse_mass
        size = tuning.step_sizes(state.position)[:, None]
        momentum = tuning.kinetic.sample(self.num_chains)
        uniform = draw_uniform(self.num_chains, momentum.device)
        end = self.trajectory(state, momentum, inverse_mass, size, num_steps)
        start = (state.position, momentum, state.evaluation.value, state.gradient)
        inputs = (*end, *start, inverse_mass, uniform)
        conclude = self.target.accelerate("leapfrog test", _conclude, *inputs)
        position, value, gradient, accepted, rate, error, diverging, energy = conclude(*inputs)
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
        return State(position, state.noise, gradient, Evaluation(value, {}, {})), info

    def trajectory(
        self,
        state: State,
        momentum: Tensor,
        inverse_mass: Tensor,
        step_size: Tensor,
        num_steps: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Leapfrog steps, one after the other.

        Arguments:
            state: Where chains start.
            momentum: Their momenta, of shape ``(chains, dimension)``.
            inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
            step_size: Of each chain, of shape ``(chains, 1)``.
            num_steps: How many steps.

        Returns:
            Position, momentum, potential and gradient at the end.
        """
        z, r, value, gradient = state.position, momentum, state.evaluation.value, state.gradient
        advance = self._advance(inverse_mass)
        for step in range(num_steps):
            z, r, value, gradient = advance(z, r, gradient, state.noise, inverse_mass, step_size)
            if self._observe is not None:
                all_chains = torch.ones_like(value, dtype=torch.bool)
                self._observe(z, value, gradient, all_chains, all_chains & (step == 0))
        return z, r, value, gradient

    def refreshed(self, state: State, tuning: Tuning) -> State:
        """The state with potential and gradient computed anew, after its noise has changed.

        A leapfrog step of size zero does it, so that one program serves for all gradients.
        """
        still = torch.zeros_like(state.position)
        size = still[:, :1]
        inverse_mass = tuning.kinetic.inverse_mass
        _, _, value, gradient = self._advance(inverse_mass)(
            state.position, still, still, state.noise, inverse_mass, size
        )
        return state._replace(gradient=gradient, evaluation=state.evaluation._replace(value=value))

    def _advance(self, inverse_mass: Tensor) -> Program:
        """The leapfrog step as one program."""

        def advance(*inputs: Tensor) -> tuple[Tensor, ...]:
            return leapfrog_step(self._value_and_gradient, *inputs)

        position, noise = self.target.vectors(self.num_chains)
        size = position.new_ones(len(position), 1)
        examples = (position, position, position, noise, inverse_mass, size)
        return self.target.accelerate("leapfrog", advance, *examples)


def _conclude(
    z: Tensor,
    r: Tensor,
    value: Tensor,
    gradient: Tensor,
    position: Tensor,
    momentum: Tensor,
    old_value: Tensor,
    old_gradient: Tensor,
    inverse_mass: Tensor,
    uniform: Tensor,
) -> tuple[Tensor, ...]:
    """The Metropolis test at a trajectory's end: the new state, the decision, the energy."""
    kinetic = GaussianKinetic(inverse_mass)
    before, after = kinetic.energy(momentum).double(), kinetic.energy(r).double()
    gain = value.double() - old_value.double()
    decision = metropolis(gain + (after - before), uniform)
    accepted = decision.accepted
    kept = select(accepted, value, old_value)
    energy = kept.double() + torch.where(accepted, after, before)
    moved = (select(accepted, z, position), kept, select(accepted, gradient, old_gradient))
    return *moved, *decision, energy
