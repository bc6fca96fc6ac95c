"""Hamiltonian Monte Carlo, all chains at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import leapfrog_step
from pyro_hamflow.mcmc.transition import (
    Info,
    State,
    Tuning,
    metropolis,
    select,
)
from pyro_hamflow.model.capture import Program
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation


class HMCTransition:
    """Moves parameters along leapfrog trajectories, the noise of a likelihood estimate held.

    Arguments:
        potential: The target.
        num_chains: How many chains.

    Invariant:
        The density exp(-U(z, u)) of the positions at their noise, exactly.

    References:
        | MCMC using Hamiltonian dynamics (Neal, 2011)
        | https://arxiv.org/abs/1206.1901
    """

    def __init__(self, potential: Potential, num_chains: int) -> None:
        self.potential = potential
        self.num_chains = num_chains
        self._gradient = potential.graph("gradient", num_chains)
        self._steps: dict[int, Program] = {}

    def begin(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self._gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        inverse_mass = tuning.kinetic.inverse_mass
        size = torch.full_like(self.potential.example, tuning.step_size)
        momentum = tuning.kinetic.sample(self.num_chains)
        z, r, value, slope = state.position, momentum, state.evaluation.value, state.gradient
        advance = self._advance(inverse_mass)
        for _ in range(num_steps):
            z, r, value, slope = advance(z, r, slope, state.noise, inverse_mass, size)
        kinetic_before = tuning.kinetic.energy(momentum).double()
        kinetic_after = tuning.kinetic.energy(r).double()
        before = state.evaluation.value.double()
        error = (value.double() - before) + (kinetic_after - kinetic_before)
        decision = metropolis(error)
        accepted = decision.accepted
        kept = Evaluation(select(accepted, value, state.evaluation.value), {}, {})
        moved = State(
            select(accepted, z, state.position),
            state.noise,
            select(accepted, slope, state.gradient),
            kept,
        )
        steps = torch.full_like(accepted, num_steps, dtype=torch.long)
        info = Info(
            acceptance_rate=decision.acceptance_rate,
            energy=kept.value.double() + torch.where(accepted, kinetic_after, kinetic_before),
            energy_error=decision.energy_error,
            diverging=decision.diverging,
            accepted=accepted,
            n_steps=steps,
            n_gradients=steps,
            n_densities=torch.zeros_like(steps),
            refresh_rate=torch.full_like(error, torch.nan),
        )
        return moved, info

    def refreshed(self, state: State, inverse_mass: Tensor) -> State:
        """The state with potential and gradient computed anew, after its noise has changed.

        A leapfrog step of size zero does it, so that one program serves for all gradients.
        """
        still = torch.zeros_like(state.position)
        size = torch.zeros_like(self.potential.example)
        _, _, value, slope = self._advance(inverse_mass)(
            state.position, still, still, state.noise, inverse_mass, size
        )
        return state._replace(gradient=slope, evaluation=state.evaluation._replace(value=value))

    def _advance(self, inverse_mass: Tensor) -> Program:
        """The leapfrog step as one program, for a diagonal or for a dense mass."""
        rank = inverse_mass.dim()
        if rank not in self._steps:

            def advance(*inputs: Tensor) -> tuple[Tensor, ...]:
                return leapfrog_step(self._gradient, *inputs)

            position, noise = self.potential.vectors(self.num_chains)
            self._steps[rank] = self.potential.accelerate(
                advance,
                position,
                position,
                position,
                noise,
                torch.ones_like(inverse_mass),
                self.potential.example,
            )
        return self._steps[rank]
