r"""Proposals that a learned energy makes, judged by the true one where they end.

From where a chain is, z0, transitions that are reversible for the learned density :math:`e^{-S}`
lead to a *centre*, which is not judged, and from the centre others lead to z1, ..., zM, side by
side. Seen from the centre, z0 is one among the others: given all of them, each may have been the
first, with odds

.. math:: w_j = e^{S(z_j) - U(z_j)}.

So M draws are taken by these weights, and the chain goes on from the last of them. This takes one
true energy for each draw, and no gradient; and as the M are evaluated together, which costs little
more than one alone wherever overhead outweighs arithmetic, a draw costs a fraction of that.

Where the energy is an estimate, its noise is held meanwhile, and refreshed before proposals are
made again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import DIVERGENCE, Block, Info, State, Transition, Tuning
from pyro_hamflow.mcmc.transitions.native import NativeTransition
from pyro_hamflow.mcmc.transitions.native_energy import NativeEnergy
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, Refresh
from pyro_hamflow.mcmc.transitions.proposal_set import (
    ProposalSet,
    gather,
    pick,
    pick_all,
    pick_systematically,
    repeat_rows,
)
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.surrogates.targets import SurrogateDensity


class SurrogateMove(NamedTuple):
    """Several transitions of the learned density, one after the other, for many rows at once.

    Attributes:
        energy_before: The learned energy where they began, of shape ``(rows,)``, in float64.
        position: Where they ended, of shape ``(rows, dimension)``.
        energy_after: The learned energy there, of shape ``(rows,)``, in float64.
        kinetic: The kinetic energy at the end of the last one, of shape ``(rows,)``.
        steps: How many leapfrog steps they took in all, of shape ``(rows,)``.
        info: What happened in the last one.
    """

    energy_before: Tensor
    position: Tensor
    energy_after: Tensor
    kinetic: Tensor
    steps: Tensor
    info: Info


class MultipleProposalTransition:
    """Moves by transitions on a learned density, several at once, and weighs where they end.

    A set of ``num_proposals`` proposals gives as many draws; each step returns one of them, and
    where they are used up, makes another set. The acceptance rate of a set is the overlap of its
    weights with equal weights: zero if one candidate has all the weight, one if they are equal.
    Energy errors and divergences are those of the proposals, one with each draw; the renewed share
    of the noise is the set's.

    Parameters move with the noise held, which the estimates at that noise correct, and the noise is
    refreshed by another. Were fresh noise proposed with the parameters, and accepted with them,
    chains would stay for long where an estimate came out high; element by element it is renewed.

    Arguments:
        target: The true one.
        surrogate: The learned density.
        make_inner: Makes a transition that is reversible for a learned density, of so many rows.
        num_chains: How many chains.
        refresh: The move of the noise.
        blocks: Which parts of the noise are accepted together.
        num_transitions: How many transitions lead to the centre, and from there to each end.
        num_proposals: How many ends are judged together; so many draws come of them.
        energy: The true energies in machine code; those of the target if not given.

    Attributes:
        ahead: The draws of a set that are yet to be returned, and what happened.

    Invariant:
        The density exp(-U(z, u)) N(u; 0, I) of positions and noise, exactly, whatever the network.

    References:
        | Surrogate transitions: Monte Carlo Strategies in Scientific Computing (Liu, 2001), 9.4.3
        | Using all Metropolis-Hastings proposals to estimate mean values (Tjelmeland, 2004)
        | A general construction for parallelizing Metropolis-Hastings algorithms (Calderhead, 2014)
        | https://doi.org/10.1073/pnas.1408184111
        | Pseudo-marginal slice sampling (Murray, Graham, 2016), for the noise
        | https://arxiv.org/abs/1510.02958
    """

    def __init__(
        self,
        target: Target,
        surrogate: SurrogateDensity,
        make_inner: Callable[[int], Transition],
        num_chains: int,
        refresh: Refresh,
        blocks: Blocks,
        *,
        num_transitions: int,
        num_proposals: int,
        energy: NativeEnergy | None = None,
    ) -> None:
        self.target = target
        self.energy = target if energy is None else energy
        self.surrogate = surrogate
        self.to_centre = make_inner(num_chains)
        self.from_centre = make_inner(num_chains * num_proposals)
        self.refresh = refresh
        self.blocks = blocks
        self.num_transitions = num_transitions
        self.num_proposals = num_proposals
        self.ahead: list[tuple[State, Info]] = []
        self._latest: State | None = None

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.energy.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        if state is not self._latest:  # the chains were moved elsewhere meanwhile
            self.ahead = []
        if not self.ahead:
            made = self._propose(state, tuning, num_steps)
            self.ahead = [made.draw(number) for number in range(self.num_proposals)]
        self._latest, info = self.ahead.pop(0)
        return self._latest, info

    def block(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Block]:
        """All draws of another set of proposals, and the last of them to go on from."""
        made = self._propose(state, tuning, num_steps)
        self.ahead, (self._latest, _) = [], made.draw(self.num_proposals - 1)
        return self._latest, made.block()

    def is_due(self, state: State) -> bool:
        """Whether another set is made of chains that are there."""
        return not self.ahead or state is not self._latest

    def ended(self, state: State) -> bool:
        """Whether chains are at the last draw of a set of proposals."""
        return not self.ahead and state is self._latest

    def move_along_surrogate(
        self, inner: Transition, position: Tensor, tuning: Tuning, num_steps: int
    ) -> SurrogateMove:
        """Makes ``num_transitions`` transitions of the learned density.

        Arguments:
            inner: The transition, of as many rows as there are positions.
            position: Where to begin, of shape ``(rows, dimension)``.
            tuning: What the transition is tuned to.
            num_steps: The steps of each trajectory, or the most of them.
        """
        state = inner.state_at(position, position[:, :0])
        before = state.evaluation.value.double()
        if isinstance(inner, NativeTransition):
            state, info, steps = inner.several(state, tuning, num_steps, self.num_transitions)
            after = state.evaluation.value.double()
            return SurrogateMove(before, state.position, after, info.energy - after, steps, info)
        steps = torch.zeros(len(position), dtype=torch.long, device=position.device)
        for _ in range(self.num_transitions):
            state, info = inner.step(state, tuning, num_steps)
            steps = steps + info.n_steps
        after = state.evaluation.value.double()
        return SurrogateMove(before, state.position, after, info.energy - after, steps, info)

    def log_weights(self, value: Tensor, learned: Tensor) -> Tensor:
        """The logarithms of the candidates' weights: learned energy less true energy.

        Arguments:
            value: The true energies, of shape ``(chains, 1 + count)``.
            learned: The learned ones.

        Returns:
            The same shape; minus infinity where either is no finite number.
        """
        return (learned - value.double()).nan_to_num(*3 * [-torch.inf])

    def _propose(self, state: State, tuning: Tuning, num_steps: int) -> ProposalSet:
        """Makes a set of proposals, and draws ``num_proposals`` states from it.

        The first of them carries the costs of the centre and of the noise's refresh.
        """
        count = self.num_proposals
        noise, here, share, refreshes = self._refreshed(state)
        centre = self.move_along_surrogate(self.to_centre, state.position, tuning, num_steps)
        ends = self.move_along_surrogate(
            self.from_centre, repeat_rows(centre.position, count), tuning, num_steps
        )
        noises = repeat_rows(noise, count)
        there = self.energy.evaluate(ends.position, noises)

        log_weights = self.log_weights(
            gather(here.value, there.value), gather(centre.energy_before, ends.energy_after)
        )
        lost = ~log_weights[:, :1].isfinite()  # where the learned energy is no number: it stays
        log_weights = log_weights.masked_fill(lost, -torch.inf)
        log_weights[:, :1] = log_weights[:, :1].masked_fill(lost, 0.0)
        weights = log_weights.softmax(-1)
        picks = pick_systematically(weights, count)
        position, kinetic, value = (
            pick(gather(old, new), picks)
            for old, new in (
                (state.position, ends.position),
                (centre.kinetic, ends.kinetic),
                (here.value, there.value),
            )
        )
        likelihoods = pick_all(here.log_likelihoods, there.log_likelihoods, picks)
        local = pick_all(here.local, there.local, picks)
        error = log_weights[:, :1] - log_weights[:, 1:]
        before = torch.cat([state.position[:, None], position[:, :-1]], 1)
        moved = (position != before).any(-1)
        evenness = weights.clamp(max=1.0 / (count + 1)).sum(-1, keepdim=True)
        first = torch.arange(count, device=picks.device) == 0
        rows = picks.shape
        statistics = {
            "accepted": moved,
            "acceptance_rate": ((count + 1) * evenness - 1.0).expand(rows) / count,
            "energy_error": error,
            "diverging": error > DIVERGENCE,
            "energy": value.double() + kinetic,
            "n_steps": ends.steps.reshape(rows) + first * centre.steps[:, None],
            "n_gradients": torch.zeros_like(picks),
            "n_densities": (1 + first * refreshes).expand(rows),
        }
        further = {name: part.reshape(rows) for name, part in ends.info.further.items()}
        further |= {"surrogate_accepted": moved, "surrogate_error": error}
        if share is not None:
            further["refresh_rate"] = share[:, None].expand(rows)
        evaluation = Evaluation(value, likelihoods, local)
        info = Info(**statistics, further=further)
        return ProposalSet(position, noise, state.gradient, evaluation, info)

    def _refreshed(self, state: State) -> tuple[Tensor, Evaluation, Tensor | None, int]:
        """Refreshes the noise, if there is any.

        Returns:
            The noise; the evaluation there; the share of it that was renewed, of shape
            ``(chains,)``, none if there is no noise; how many densities that took.
        """
        if not state.noise.shape[1]:
            return state.noise, state.evaluation, None, 0
        return self.refresh(
            self.blocks,
            state.noise,
            state.evaluation,
            lambda proposed: self.energy.evaluate(state.position, proposed),
        )
