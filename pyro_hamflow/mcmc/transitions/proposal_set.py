"""Proposals that are judged together: how draws are picked from them, and what these are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Block, Info, State, padded
from pyro_hamflow.model.recovery import Evaluation


class ProposalSet(NamedTuple):
    """The draws that come of a set of proposals, all of them with the same noise.

    Attributes:
        position: Of shape ``(chains, draws, dimension)``.
        noise: Of shape ``(chains, noise_dimension)``.
        gradient: Zeros, of shape ``(chains, dimension)``.
        evaluation: The potential, of shape ``(chains, draws)``, and what belongs to it.
        info: What happened, each statistic of shape ``(chains, draws)``.
    """

    position: Tensor
    noise: Tensor
    gradient: Tensor
    evaluation: Evaluation
    info: Info

    def draw(self, number: int) -> tuple[State, Info]:
        """One draw of each chain."""

        def picked(parts: dict[str, Tensor]) -> dict[str, Tensor]:
            return {name: part[:, number] for name, part in parts.items()}

        value, factors, local = self.evaluation
        evaluation = Evaluation(value[:, number], picked(factors), picked(local))
        statistics = picked({n: part for n, part in self.info._asdict().items() if n != "further"})
        info = Info(**statistics, further=picked(dict(self.info.further)))
        return State(self.position[:, number], self.noise, self.gradient, evaluation), info

    def block(self) -> Block:
        """All of them."""
        value, factors, local = self.evaluation
        sums = [part.double().reshape(*value.shape, -1).sum(-1) for part in factors.values()]
        estimate = torch.stack(sums).sum(0) if sums else None
        return Block(self.position, value, padded(self.info), local, estimate)


def block_of_one(state: State, info: Info) -> Block:
    """One draw of each chain as a block."""

    def lone(parts: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part[:, None] for name, part in parts.items()}

    statistics = padded(info)._asdict()
    further = lone(dict(statistics.pop("further")))
    value, factors, local = state.evaluation
    evaluation = Evaluation(value[:, None], lone(factors), lone(local))
    position, whole = state.position[:, None], Info(**lone(statistics), further=further)
    return ProposalSet(position, state.noise, state.gradient, evaluation, whole).block()


def pick_systematically(weights: Tensor, count: int) -> Tensor:
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


def repeat_rows(rows: Tensor, count: int) -> Tensor:
    """Each row so many times, next to each other: of shape ``(rows * count, *)``."""
    return rows.repeat_interleave(count, 0)


def gather(old: Tensor, new: Tensor) -> Tensor:
    """The candidates of each chain: first where it is, then its proposals.

    Arguments:
        old: Something of where chains are, of shape ``(chains, *)``.
        new: The same of their proposals, of shape ``(chains * count, *)``.

    Returns:
        Of shape ``(chains, 1 + count, *)``.
    """
    return torch.cat([old[:, None], new.reshape(len(old), -1, *old.shape[1:])], 1)


def pick(candidates: Tensor, picks: Tensor) -> Tensor:
    """Of each chain, the candidates that ``picks``, of shape ``(chains, count)``, names."""
    return candidates[torch.arange(len(picks), device=picks.device)[:, None], picks]


def pick_all(old: dict[str, Tensor], new: dict[str, Tensor], picks: Tensor) -> dict[str, Tensor]:
    """The same of every named part of where chains are, and of their proposals."""
    return {name: pick(gather(old[name], part), picks) for name, part in new.items()}
