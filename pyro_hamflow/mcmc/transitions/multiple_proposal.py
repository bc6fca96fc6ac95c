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

from pyro_hamflow.mcmc.transitions.base import DIVERGENCE, Info, ParameterTransition, State, Tuning
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, Refresh
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.surrogates.targets import SurrogateDensity


class Journey(NamedTuple):
    """Where transitions of the learned density lead, in rows.

    Attributes:
        first: The learned energy where they began, of shape ``(rows,)``, in float64.
        position: Of shape ``(rows, dimension)``.
        last: The learned energy where they end.
        kinetic: The kinetic energy on arrival, of shape ``(rows,)``.
        steps: How many it took, of shape ``(rows,)``.
        info: What happened in the last of them.
    """

    first: Tensor
    position: Tensor
    last: Tensor
    kinetic: Tensor
    steps: Tensor
    info: Info


class MultipleProposalTransition:
    """Moves by transitions on a learned density, several at once, and weighs where they end.

    Each step returns one of the draws that a set of proposals gives; every ``num_proposals`` steps
    another set is made. The acceptance rate is what the set's weights have in common with equal
    ones, from none, where all weight is where the chain is, to one; energy errors and divergences
    are those of the proposals, one with each draw; the renewed share of the noise is the set's.

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
        make_inner: Callable[[int], ParameterTransition],
        num_chains: int,
        refresh: Refresh,
        blocks: Blocks,
        *,
        num_transitions: int,
        num_proposals: int,
    ) -> None:
        self.target = target
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
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        if state is not self._latest:  # the chains were moved elsewhere meanwhile
            self.ahead = []
        if not self.ahead:
            self.ahead = self._propose(state, tuning, num_steps)
        self._latest, info = self.ahead.pop(0)
        return self._latest, info

    def ended(self, state: State) -> bool:
        """Whether a set of proposals has given its last draw, which the chains are at."""
        return not self.ahead and state is self._latest

    def lead(
        self, inner: ParameterTransition, position: Tensor, tuning: Tuning, num_steps: int
    ) -> Journey:
        """Where the learned density's transitions lead from positions ``(rows, dimension)``."""
        state = inner.state_at(position, position[:, :0])
        first = state.evaluation.value.double()
        steps = torch.zeros(len(position), dtype=torch.long, device=position.device)
        for _ in range(self.num_transitions):
            state, info = inner.step(state, tuning, num_steps)
            steps = steps + info.n_steps
        last = state.evaluation.value.double()
        return Journey(first, state.position, last, info.energy - last, steps, info)

    def log_weights(self, value: Tensor, learned: Tensor) -> Tensor:
        """By how much the learned energy of candidates exceeds the true one."""
        return (learned - value.double()).nan_to_num(*3 * [-torch.inf])

    def _propose(self, state: State, tuning: Tuning, num_steps: int) -> list[tuple[State, Info]]:
        """Draws from several proposals about a centre, and what each took."""
        count = self.num_proposals
        noise, here, share, refreshes = self._refreshed(state)
        centre = self.lead(self.to_centre, state.position, tuning, num_steps)
        ends = self.lead(self.from_centre, _fan(centre.position, count), tuning, num_steps)
        fanned = _fan(noise, count)
        there = self.target.evaluate(ends.position, fanned)

        log_weights = self.log_weights(
            _gather(here.value, there.value), _gather(centre.first, ends.last)
        )
        lost = ~log_weights[:, :1].isfinite()  # where the learned energy is no number: it stays
        log_weights = log_weights.masked_fill(lost, -torch.inf)
        log_weights[:, :1] = log_weights[:, :1].masked_fill(lost, 0.0)
        weights = log_weights.softmax(-1)
        picks = resample_systematically(weights, count)
        position, kinetic, value = (
            _pick(_gather(old, new), picks)
            for old, new in (
                (state.position, ends.position),
                (centre.kinetic, ends.kinetic),
                (here.value, there.value),
            )
        )
        likelihoods = _pick_all(here.log_likelihoods, there.log_likelihoods, picks)
        local = _pick_all(here.local, there.local, picks)
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
        return [
            (
                State(
                    position[:, k],
                    noise,
                    state.gradient,
                    Evaluation(
                        value[:, k],
                        {name: part[:, k] for name, part in likelihoods.items()},
                        {name: part[:, k] for name, part in local.items()},
                    ),
                ),
                Info(
                    **{name: part[:, k] for name, part in statistics.items()},
                    further={name: part[:, k] for name, part in further.items()},
                ),
            )
            for k in range(count)
        ]

    def _refreshed(self, state: State) -> tuple[Tensor, Evaluation, Tensor | None, int]:
        """The noise moved, the evaluation there, the share that moved, and what it took."""
        if not state.noise.shape[1]:
            return state.noise, state.evaluation, None, 0
        return self.refresh(
            self.blocks,
            state.noise,
            state.evaluation,
            lambda proposed: self.target.evaluate(state.position, proposed),
        )


def resample_systematically(weights: Tensor, count: int) -> Tensor:
    """Picks so many candidates of each chain that none comes much more often than it should.

    Points at equal distances, from a random first one, are laid along the cumulated weights, and
    read from a random one of them on: each pick by itself is made by the weights.

    Arguments:
        weights: Of shape ``(chains, candidates)``; those of a chain sum to one.
        count: How many picks.

    Returns:
        Indices of candidates, of shape ``(chains, count)``; equal ones are neighbours.
    """
    shape, device = (len(weights), 1), weights.device
    number = torch.arange(count, device=device)
    points = (number + torch.rand(shape, dtype=weights.dtype, device=device)) / count
    picks = torch.searchsorted(weights.cumsum(-1), points).clamp(max=weights.shape[1] - 1)
    return picks.gather(1, (number + torch.randint(count, shape, device=device)) % count)


def _fan(rows: Tensor, count: int) -> Tensor:
    """Each chain's row so many times."""
    return rows.repeat_interleave(count, 0)


def _gather(old: Tensor, new: Tensor) -> Tensor:
    """Candidates of each chain, first where it is, then its proposals."""
    return torch.cat([old[:, None], new.reshape(len(old), -1, *old.shape[1:])], 1)


def _pick(candidates: Tensor, picks: Tensor) -> Tensor:
    return candidates[torch.arange(len(picks), device=picks.device)[:, None], picks]


def _pick_all(old: dict[str, Tensor], new: dict[str, Tensor], picks: Tensor) -> dict[str, Tensor]:
    return {name: _pick(_gather(old[name], part), picks) for name, part in new.items()}
