"""Draws that lie in a store, and are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.store import Store

_POSITIONS = "unconstrained_posterior"


class Stored(Mapping[str, Tensor]):
    """Variables of a group of a store, each read when it is asked for.

    Arguments:
        path: Where the store is.
        group: Which group.
        names: The names of the variables.
        chains: The numbers of the chains that are wanted.
        draws: How many of the first draws are.
    """

    def __init__(
        self, path: str, group: str, names: Sequence[str], chains: Sequence[int], draws: int
    ) -> None:
        self._path, self._group, self._names = path, group, list(names)
        self._chains, self._draws = chains, draws

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._read(Store(self._path, writes=False), name, slice(0, self._draws))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def stretches(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A variable, so many draws at a time, each with the number of its first draw."""
        store = Store(self._path, writes=False)
        for first, stop in store.variable(self._group, name).stretches(self._draws):
            yield first, self._read(store, name, slice(first, stop))

    def _read(self, store: Store, name: str, draws: slice) -> Tensor:
        chains = self._chains
        first, stop = min(chains), max(chains) + 1
        found = store.read(self._group, name, slice(first, stop), draws)
        if len(chains) < stop - first:
            found = found[np.asarray(chains) - first]
        return torch.from_numpy(found)


class StoredDraws(Draws):
    """Draws that lie in a store: none of their parts is in memory."""

    _positions: Stored
    _extent: tuple[int, int, int]

    def __init__(
        self,
        positions: Stored,
        stats: Mapping[str, Tensor],
        local: Mapping[str, Tensor],
        extent: tuple[int, int, int],
    ) -> None:
        vars(self).update(_positions=positions, stats=stats, local=local, _extent=extent)

    @property
    def position(self) -> Tensor:
        """All positions, read anew."""
        return self._positions["position"]

    @property
    def extent(self) -> tuple[int, int, int]:
        return self._extent

    def columns(self, places: list[int]) -> Tensor:
        return torch.cat([rows[..., places] for _, rows in self.stretches()], 1)

    def stretches(self) -> Iterator[tuple[int, Tensor]]:
        yield from self._positions.stretches("position")


def stored_draws(
    store: Store, prefix: str, chains: Sequence[int], draws: int, local: Sequence[str]
) -> StoredDraws:
    """So many of the first draws of chains.

    Arguments:
        store: Where they are.
        prefix: Before the names of groups.
        chains: The numbers of the chains.
        draws: How many draws of each.
        local: The names of recovered sites that are kept.
    """

    def of(group: str, names: Sequence[str]) -> Stored:
        return Stored(str(store.path), prefix + group, names, chains, draws)

    stats = of("sample_stats", list(store.group(prefix + "sample_stats")))
    dimension = store.variable(prefix + _POSITIONS, "position").array.shape[2]
    extent = len(chains), draws, dimension
    return StoredDraws(of(_POSITIONS, ["position"]), stats, of("posterior", local), extent)
