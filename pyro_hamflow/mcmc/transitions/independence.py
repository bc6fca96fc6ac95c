"""Independence Metropolis: every proposal comes from a frozen guide."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import (
    Info,
    State,
    draw_uniform,
    metropolis,
    select_state,
)
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.potential import Potential


class FlowMHTransition:
    """Proposes a draw of the guide for each chain, noise included.

    What the guide draws besides the position is redrawn from r, which leaves the target as it is,
    before each proposal; so that chains do not stay where it was lucky.

    Arguments:
        target: The target.
        guide: The guide.

    Invariant:
        The extended density of parameters and noise, exactly, for any guide that stays the same.
    """

    def __init__(self, target: Potential, guide: DensityGuide) -> None:
        self.target = target
        self.guide = guide

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    @torch.no_grad()
    def step(self, state: State) -> tuple[State, Info]:
        chains = len(state.position)
        here = log_ratio_at(self.guide, state.position)
        position, there = draw_from(self.guide, self.target, chains)
        noise = self.target.draw_noise(chains)
        evaluation = self.target.evaluate(position, noise)
        error = evaluation.value.double() - state.evaluation.value.double()
        error = error + (there.double() - here.double())
        decision = metropolis(error, draw_uniform(chains, error.device))
        proposed = State(position, noise, state.gradient, evaluation)
        moved = select_state(decision.accepted, proposed, state)
        # A poor proposal is no divergence of a trajectory: there is none.
        decision = decision._replace(diverging=torch.zeros_like(decision.diverging))
        info = Info(
            *decision,
            energy=moved.evaluation.value.double(),
            n_steps=0,
            n_gradients=0,
            n_densities=1,
        )
        return moved, info
