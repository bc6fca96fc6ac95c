r"""Proposals of a frozen guide, several at once, in place of where a chain is.

With q the guide's density and :math:`w = e^{-U} / q` the importance weight, one of N proposals is
picked by their weights, and taken with the probability

.. math:: \min\Bigl(1, \frac{\sum_i w_i}{w_0 + \sum_{i \ne k} w_i}\Bigr),

where :math:`w_0` is the weight of the present position and k is the proposal that was picked. One
proposal is Metropolis's. Iterated sampling importance resampling, which picks one among all N + 1
by their weights, is exact as well, but moves less often from anywhere to anywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import (
    Decision,
    Info,
    State,
    Tuning,
    draw_uniform,
    metropolis_of_point,
    select_state,
)
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import ELEMENTS

_ROWS = 512  # of proposals made together: on small models they cost little more than four


class IndependenceTransition:
    """Proposes draws of the guide for each chain, noise included.

    What the guide draws besides the position is redrawn from r, which leaves the target as it is,
    before each move; so that chains do not stay where it was lucky. As proposals do not depend on
    where chains are, those of many moves are made and evaluated together.

    Where a weight is no finite number, the proposal is not taken; and where the guide's density is
    none at a chain's own position, it stays, for it could not come back.

    Arguments:
        target: The target.
        guide: The guide, trained no further.
        num_proposals: How many proposals are made for each chain and move.

    Invariant:
        The extended density of parameters and noise, exactly, for any guide that stays the same.

    References:
        | Monte Carlo Strategies in Scientific Computing (Liu, 2001), 5.5: multiple-try Metropolis
        | Particle Markov chain Monte Carlo methods (Andrieu, Doucet, Holenstein, 2010), 2.4.2, for
          iterated sampling importance resampling
        | https://doi.org/10.1111/j.1467-9868.2009.00736.x
    """

    def __init__(self, target: Potential, guide: DensityGuide, num_proposals: int = 1) -> None:
        self.target: Target = target
        self._potential = target
        self.guide = guide
        self.num_proposals = num_proposals
        self._ahead: list[Proposals] = []

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    @torch.no_grad()
    def step(
        self, state: State, tuning: Tuning | None = None, num_steps: int = 0
    ) -> tuple[State, Info]:
        """Moves every chain once; nothing is tuned. Gradients stay those of where it was."""
        chains = len(state.position)
        proposals = self._next(chains)
        log_weights = proposals.log_weights.reshape(chains, -1)
        pick, decision = choose(self.log_weight_at(state), log_weights)
        rows = torch.arange(chains, device=pick.device) * self.num_proposals + pick
        picked = proposals.at(rows)
        proposed = State(picked.position, picked.noise, state.gradient, picked.evaluation)
        moved = select_state(decision.accepted, proposed, state)
        info = Info(
            *decision,
            energy=moved.evaluation.value.double(),
            n_steps=0,
            n_gradients=0,
            n_densities=self.num_proposals,
        )
        return moved, info

    def log_weight_at(self, state: State) -> Tensor:
        """The logarithm of the weight of where chains are, infinite where they have to stay."""
        log_ratio = log_ratio_at(self.guide, state.position)
        here = log_weight(state.evaluation.value, log_ratio)
        return here.masked_fill(~log_ratio.isfinite(), torch.inf)

    def propose(self, count: int) -> Proposals:
        """Draws of the guide with fresh noise, and the target there."""
        position, log_ratio = draw_from(self.guide, self._potential, count)
        noise = self._potential.draw_noise(count)
        evaluation = self.target.evaluate(position, noise)
        log_weights = log_weight(evaluation.value, log_ratio)
        log_weights = log_weights.masked_fill(~log_weights.isfinite(), -torch.inf)
        return Proposals(position, noise, evaluation, log_weights)

    def _next(self, num_chains: int) -> Proposals:
        """The proposals of one move; those of one chain are neighbours."""
        rows = num_chains * self.num_proposals
        if not self._ahead:
            width = max(1, self.target.dimension + self.target.noise_dimension)
            moves = max(1, min(_ROWS, ELEMENTS // width) // rows)
            made = self.propose(moves * rows)
            self._ahead = [made.at(slice(i * rows, (i + 1) * rows)) for i in range(moves)]
        return self._ahead.pop()


class Proposals(NamedTuple):
    """Draws of a guide with their noise, the target there, and their weights; rows first."""

    position: Tensor
    noise: Tensor
    evaluation: Evaluation
    log_weights: Tensor

    def at(self, rows: Tensor | slice) -> Proposals:
        """Some of them."""
        position, noise, evaluation, log_weights = self
        parts = (
            {name: part[rows] for name, part in named.items()}
            for named in (evaluation.log_likelihoods, evaluation.local)
        )
        evaluation = Evaluation(evaluation.value[rows], *parts)
        return Proposals(position[rows], noise[rows], evaluation, log_weights[rows])


def choose(here: Tensor, log_weights: Tensor) -> tuple[Tensor, Decision]:
    """Picks one of each chain's proposals by their weights, and decides whether it is taken.

    Arguments:
        here: Logarithms of the weights of where chains are, of shape ``(chains,)``.
        log_weights: Those of their proposals, of shape ``(chains, proposals)``.

    Returns:
        Which proposal was picked, of shape ``(chains,)``, and the decision.
    """
    pick = pick_by_weight(log_weights)
    others = log_weights.scatter(1, pick[:, None], here[:, None])
    error = others.logsumexp(1) - log_weights.logsumexp(1)
    return pick, metropolis_of_point(error, draw_uniform(len(here), error.device))


def pick_by_weight(log_weights: Tensor) -> Tensor:
    """Which of the last dimension is picked, at random by the weights."""
    return (log_weights - torch.empty_like(log_weights).exponential_().log()).argmax(-1)


def log_weight(value: Tensor, log_ratio: Tensor) -> Tensor:
    """The logarithm of the importance weight, up to a constant, in float64."""
    return -(value.double() + log_ratio.double())
