"""Independence Metropolis: every proposal comes from a frozen guide."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import (
    Info,
    State,
    Tuning,
    draw_level,
    metropolis,
    select,
    select_evaluation,
)
from pyro_hamflow.model.potential import Potential


class Proposal(Protocol):
    """Draws of all parameters on the real line, as a guide makes them."""

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Sees the model's arguments before the first draw."""

    def propose(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)``, and log M - log r, which weights divide by."""


class IndependenceProposal(Proposal, Protocol):
    """A frozen guide that also tells the density of given positions."""

    def log_ratio(self, position: Tensor) -> Tensor:
        """Log M - log r at given positions, with the rest drawn from r."""


class FlowMHTransition:
    """Proposes a draw of the guide for each chain, noise included.

    What the guide draws besides the position is redrawn from r, which leaves the target as it is,
    before each proposal; so that chains do not stay where it was lucky.

    Arguments:
        potential: The target.
        proposal: The guide.

    Invariant:
        The extended density of parameters and noise, exactly, for any proposal that stays the same.
    """

    def __init__(self, potential: Potential, proposal: IndependenceProposal) -> None:
        self.potential = potential
        self.proposal = proposal

    def begin(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.potential.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    @torch.no_grad()
    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        chains = len(state.position)
        here = self.proposal.log_ratio(state.position)
        position, there = self.proposal.propose(chains)
        noise = self.potential.draw_noise(chains)
        evaluation = self.potential.evaluate(position, noise)
        error = evaluation.value.double() - state.evaluation.value.double()
        error = error + (there.double() - here.double())
        decision = metropolis(error, draw_level(chains, error.device))
        accepted = decision.accepted
        kept = select_evaluation(accepted, evaluation, state.evaluation)
        moved = State(
            select(accepted, position, state.position),
            select(accepted, noise, state.noise),
            state.gradient,
            kept,
        )
        # A poor proposal is no divergence of a trajectory: there is none.
        decision = decision._replace(diverging=torch.zeros_like(decision.diverging))
        info = Info(*decision, energy=kept.value.double(), n_steps=0, n_gradients=0, n_densities=1)
        return moved, info
