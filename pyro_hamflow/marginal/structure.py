"""What is found out about a model before its local sites are integrated out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.model.trace import Frames

LONG = 16  # numbers of one element, from which on they are taken for a path
_FEWEST = 3  # sites with numbers that make a chain


def chains(names: Iterable[str]) -> dict[str, list[str]]:
    """Sites with a number at the end of their names, by what is before it; others by their names.

    Example:
        >>> chains(["x_0", "x_1", "x_2", "y_1"])
        {'x': ['x_0', 'x_1', 'x_2'], 'y_1': ['y_1']}
    """
    stems: dict[str, list[str]] = {}
    for name in names:
        stems.setdefault(_stem(name), []).append(name)
    found: dict[str, list[str]] = {}
    for stem, alike in stems.items():
        found |= {stem: alike} if stem and len(alike) >= _FEWEST else {n: [n] for n in alike}
    return found


def sites_named(name: str, latent: Iterable[str]) -> list[str]:
    """The latent sites that a name stands for: this one, or a loop of sites with numbers after it.

    Where no site has the name and one number, those with two are meant, of loops within a loop.

    Example:
        >>> sites_named("x", ["scale", "x_0", "x_1"]), sites_named("scale", ["scale", "x_0", "x_1"])
        (['x_0', 'x_1'], ['scale'])
        >>> sites_named("x", ["scale", "x_0_0", "x_0_1", "x_1_0"])
        ['x_0_0', 'x_0_1', 'x_1_0']
    """
    names, stem = list(latent), name.rstrip("_")
    stems = {} if name in names or not stem else {other: _stem(other) for other in names}
    while any(stems.values()):
        if loop := [other for other, found in stems.items() if found == stem]:
            return loop
        stems = {other: _stem(found) for other, found in stems.items()}
    return [name]


def _stem(name: str) -> str:
    """A name without the number at its end; empty if there is none."""
    stem = name.rstrip("0123456789")
    return stem.rstrip("_") if stem != name else ""


@dataclass(frozen=True)
class Group:
    """Local sites that are integrated out together, one estimate per element of their plates.

    Attributes:
        sites: The local sites, in the model's order.
        terms: Observed sites whose log densities enter the estimate.
        frames: The plates around the group, leftmost first.
        event_dims: The number of event dimensions of each site.
        rows: For each term outside these plates, to which element each entry of its log density
            belongs: an integer tensor of its shape, counted from zero; -1 where to none.
        joined: Plates around its sites whose elements depend on each other: one estimate's.
    """

    sites: tuple[str, ...]
    terms: tuple[str, ...]
    frames: Frames
    event_dims: tuple[int, ...]
    rows: Mapping[str, Tensor] = field(default_factory=dict, compare=False)
    joined: Frames = ()

    @cached_property
    def name(self) -> str:
        """The names of its sites; those of a chain, numbered one after the other, by their stem."""
        return "_".join(chains(self.sites))

    @property
    def shape(self) -> torch.Size:
        """The shape of the group's independent elements."""
        return torch.Size(frame.size for frame in self.frames)


@dataclass(frozen=True)
class Structure:
    """What :func:`~pyro_hamflow.marginal.dependence.analyse` finds out about a model.

    Attributes:
        key: What the model did when it was looked at: it holds for runs that do the same.
        values: The latent sites' values then.
        groups: The groups of local sites.
        parameters: The latent sites that stay, discrete ones included.
        hidden: Sites that take part in an estimate, or follow from local values.
        placeholders: A value for each local and each discrete site, to run the rest with.
        nesting: How many dimensions, counted from the right, are plates.
        programs: What is captured of the model for whatever proposal, by its owner's key.
    """

    key: str
    values: dict[str, Tensor]
    groups: tuple[Group, ...]
    parameters: tuple[str, ...]
    hidden: frozenset[str]
    placeholders: dict[str, Tensor]
    nesting: int
    programs: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        """What is saved of it: programs are captured anew."""
        return self.__dict__ | {"programs": {}}

    @property
    def rest(self) -> dict[str, Tensor]:
        """Of terms outside the plates of their group, the entries that no local site enters."""
        rows = {term: rows for group in self.groups for term, rows in group.rows.items()}
        return {term: of < 0 for term, of in rows.items() if bool((of < 0).any())}
