"""Random-walk Metropolis, all chains at once."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import times
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    State,
    Tuning,
    draw_uniform,
    metropolis_of_point,
    select_state,
)
from pyro_hamflow.model.target import Target


class RandomWalkTransition:
    """Proposes normal steps, the noise of a likelihood estimate held.

    A step's covariance is the inverse mass times the square of the step size; no gradient is used.

    Arguments:
        target: The target.

    Invariant:
        The density exp(-U(z, u)) of the positions at their noise, exactly.

    References:
        | Weak convergence and optimal scaling of random walk Metropolis algorithms
        | (Roberts, Gelman, Gilks, 1997)
        | https://doi.org/10.1214/aoap/1034625254
    """

    def __init__(self, target: Target) -> None:
        self.target = target

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        """Moves every chain once, whatever ``num_steps`` is."""
        root = tuning.kinetic.root
        direction = times(torch.randn_like(state.position), root if root.dim() == 1 else root.mT)
        proposed = state.position + tuning.step_sizes(state.position)[:, None] * direction
        there = self.state_at(proposed, state.noise)
        error = there.evaluation.value.double() - state.evaluation.value.double()
        decision = metropolis_of_point(error, draw_uniform(len(error), error.device))
        moved = select_state(decision.accepted, there, state)
        energy = moved.evaluation.value.double()
        return moved, Info(*decision, energy, n_steps=0, n_gradients=0, n_densities=1)

    def refreshed(self, state: State, tuning: Tuning) -> State:
        """The state as it is: it follows no gradient, and its potential is known."""
        return state
