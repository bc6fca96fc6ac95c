"""What a run keeps of each draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Block, Info, State

MOST_LOCAL_BYTES = 2**30  # of recovered sites that are kept without being asked for


def statistics(value: Tensor, info: Info, step_size: float | None) -> dict[str, Any]:
    """Statistics by their ArviZ names: tensors, or one number for all chains."""
    size = {} if step_size is None else {"step_size": step_size}
    return {
        "lp": -value,
        "energy": info.energy,
        "energy_error": info.energy_error,
        "acceptance_rate": info.acceptance_rate,
        "diverging": info.diverging,
        "accepted": info.accepted,
        "n_steps": info.n_steps,
        "n_gradients": info.n_gradients,
        "n_densities": info.n_densities,
        **size,
        **info.further,
    }


def _dtype_of(number: float) -> torch.dtype:
    return torch.float64 if isinstance(number, float) else torch.long


@dataclass
class Record:
    """Draws and their statistics, one entry of each list per draw that is kept.

    Draws that have been written elsewhere are forgotten (:meth:`forget`) and counted.

    Attributes:
        position: Positions, each of shape ``(chains, dimension)``.
        stats: Statistics by their ArviZ names, of shape ``(chains,)`` or one number for all.
        local: Recovered values of each local site.
        blocks: Draws that came many at once, and those before them; single ones come after.
        thin: Of how many draws one, the last, is kept.
        room: How many there will be, as far as is known.
        keep: Which local sites are kept; if not said, all that take a gigabyte (2^30 bytes) at
            most, and otherwise none.
        left_out: How many bytes of local sites were too many.
        made: How many draws there were, those that are not kept included.
        stored: How many were kept, and have been forgotten.
        divergences: How many transitions diverged, of all chains.
    """

    position: list[Tensor] = field(default_factory=list)
    stats: dict[str, list[Any]] = field(default_factory=dict)
    local: dict[str, list[Tensor]] = field(default_factory=dict)
    blocks: list[Draws] = field(default_factory=list)
    thin: int = 1
    room: int = 0
    keep: frozenset[str] | None = None
    left_out: int = 0
    made: int = 0
    stored: int = 0
    divergences: int = 0

    def append(self, state: State, info: Info, step_size: float | None) -> None:
        """Keeps one iteration of all chains, and its step size if it has one."""
        self.made += 1
        self.divergences += int(info.diverging.sum())
        if self.made % self.thin:
            return
        stats = statistics(state.evaluation.value, info, step_size)
        estimates = state.evaluation.log_likelihoods
        if estimates:
            sums = [part.double().reshape(len(part), -1).sum(-1) for part in estimates.values()]
            stats["log_likelihood_estimate"] = torch.stack(sums).sum(0)
        self.position.append(state.position)
        for name, stat in stats.items():
            self.stats.setdefault(name, []).append(stat)
        local = state.evaluation.local
        keep = self._kept(local) if self.keep is None else self.keep
        for name in filter(keep.__contains__, local):
            self.local.setdefault(name, []).append(local[name])

    def extend(self, draws: Draws) -> None:
        """Keeps many draws of all chains."""
        first = self.thin - 1 - self.made % self.thin
        self.made += draws.position.shape[1]
        self.divergences += int(draws.stats["diverging"].sum())
        if self.keep is None:
            self.keep = self._kept({name: part[:, 0] for name, part in draws.local.items()})
        if self.position:
            self.blocks.append(self._stacked_singles())
            self._forget_singles()
        if first < draws.position.shape[1]:
            every = slice(first, None, self.thin)
            stats = {name: stat[:, every] for name, stat in draws.stats.items()}
            # Copies, so that sites that are not kept take no memory.
            local = {n: part[:, every].clone() for n, part in draws.local.items() if n in self.keep}
            self.blocks.append(Draws(draws.position[:, every], stats, local))

    def _kept(self, local: Mapping[str, Tensor]) -> frozenset[str]:
        """Which local sites are kept where that is not said, by their size at the first draw."""
        size = self.room * sum(part.nbytes for part in local.values())
        if size > MOST_LOCAL_BYTES:
            self.left_out = size
        self.keep = frozenset(() if self.left_out else local)
        return self.keep

    @property
    def count(self) -> int:
        """How many draws are kept, here and elsewhere."""
        return self.stored + len(self)

    def forget(self) -> None:
        """Forgets draws that have been written elsewhere."""
        self.stored += len(self)
        self._forget_singles()
        self.blocks.clear()

    def _forget_singles(self) -> None:
        for values in (self.position, *self.stats.values(), *self.local.values()):
            values.clear()

    def __len__(self) -> int:
        return len(self.position) + sum(block.position.shape[1] for block in self.blocks)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {len(self)} draws>"

    def stacked(self) -> Draws:
        """All draws as tensors, chains and draws first, on the CPU."""
        singles = [self._stacked_singles()] if self.position else []
        parts = self.blocks + singles
        return parts[0] if len(parts) == 1 else Draws.follow(parts)

    def _stacked_singles(self) -> Draws:
        chains = len(self.position[0])

        def stack(parts: list[Any]) -> Tensor:
            if not isinstance(parts[0], Tensor):
                whole = torch.tensor(parts, dtype=_dtype_of(parts[0]), device="cpu")
                return whole.expand(chains, -1).clone()
            return torch.stack(parts, 1).detach().cpu()

        return Draws(
            stack(self.position),
            {name: stack(parts) for name, parts in self.stats.items()},
            {name: stack(parts) for name, parts in self.local.items()},
        )


@dataclass(frozen=True)
class Draws:
    """A record as tensors of shape ``(chains, draws, *)``; see :class:`Record` for the parts."""

    position: Tensor
    stats: Mapping[str, Tensor]
    local: Mapping[str, Tensor]

    @property
    def extent(self) -> tuple[int, int, int]:
        """How many chains there are, draws of each, and coordinates."""
        chains, length, dimension = self.position.shape
        return chains, length, dimension

    def columns(self, places: list[int]) -> Tensor:
        """Some coordinates of all positions, of shape ``(chains, draws, places)``."""
        return self.position[..., places].detach().cpu()

    def stretches(self) -> Iterator[tuple[int, Tensor]]:
        """All positions, so many draws at a time, each with the number of its first draw."""
        yield 0, self.position.detach().cpu()

    def between(self, first: int, stop: int | None) -> Draws:
        """The draws from one number to another."""
        some = slice(first, stop)
        stats = {name: stat[:, some] for name, stat in self.stats.items()}
        local = {name: part[:, some] for name, part in self.local.items()}
        return Draws(self.position[:, some], stats, local)

    @staticmethod
    def of_block(block: Block, step_size: float | None = None) -> Draws:
        """Many draws with their statistics.

        Arguments:
            block: The draws.
            step_size: Of all alike, if there is one.
        """
        shape = block.value.shape

        def filled(stat: Any) -> Tensor:
            if isinstance(stat, Tensor):
                return stat
            return torch.full(shape, stat, dtype=_dtype_of(stat), device="cpu")

        stats = statistics(block.value, block.info, step_size)
        if block.estimate is not None:
            stats["log_likelihood_estimate"] = block.estimate
        filled_stats = {name: filled(stat) for name, stat in stats.items()}
        return Draws(block.position, filled_stats, block.local)

    @staticmethod
    def follow(parts: list[Draws]) -> Draws:
        """Draws of the same chains, one part after the other."""
        stats = {n: torch.cat([part.stats[n] for part in parts], 1) for n in parts[0].stats}
        local = {n: torch.cat([part.local[n] for part in parts], 1) for n in parts[0].local}
        return Draws(torch.cat([part.position for part in parts], 1), stats, local)

    @staticmethod
    def join(parts: list[Draws]) -> Draws:
        """The draws of several chains, cut to the shortest.

        A statistic that some chains do not have, as where each has chosen its own method, is NaN.
        """
        length = min(part.position.shape[1] for part in parts)

        def cat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([tensor[:, :length] for tensor in tensors])

        def stat(name: str, part: Draws) -> Tensor:
            shape = part.position.shape[:2]
            missing = part.position.new_full(shape, math.nan, dtype=torch.float64)
            return part.stats.get(name, missing)

        names = dict.fromkeys(name for part in parts for name in part.stats)
        return Draws(
            cat([part.position for part in parts]),
            {name: cat([stat(name, part) for part in parts]) for name in names},
            {name: cat([part.local[name] for part in parts]) for name in parts[0].local},
        )
