"""The structure of a mass matrix, by the names of sites, as Pyro's users give and read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from pyro.infer.mcmc.adaptation import ArrowheadMassMatrix, BlockMassMatrix
from pyro.ops.arrowhead import SymmArrowhead
from torch import Tensor

from pyro_hamflow.checks import positive_definite
from pyro_hamflow.model.sites import Site

FullMass: TypeAlias = bool | str | Sequence[tuple[str, ...]]
InverseMass: TypeAlias = Tensor | Mapping[tuple[str, ...], Tensor]
Adapter: TypeAlias = BlockMassMatrix | ArrowheadMassMatrix
_LARGEST_DENSE = 500  # dimensions: beyond, a step's products with a dense mass are not cheap


def check_full_mass(full_mass: FullMass) -> None:
    """Raises a TypeError or ValueError if this names no structure of a mass."""
    if isinstance(full_mass, bool) or full_mass == "auto":
        return
    expected = 'True, False, "auto", or a list of tuples of names of sites'
    if not isinstance(full_mass, list | tuple):
        raise ValueError(f"`full_mass` is {full_mass!r}: expected {expected}")
    for names in full_mass:
        if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
            raise TypeError(f"`full_mass` holds {names!r}: expected {expected}")
    flat = [name for names in full_mass for name in names]
    twice = sorted({name for name in flat if flat.count(name) > 1})
    if twice:
        raise ValueError(f"`full_mass` names {twice} twice: expected each site in one tuple")


def check_inverse_mass(given: InverseMass) -> None:
    """Refuses what is no positive definite matrix, whole or in blocks, and no diagonal of one.

    Raises:
        TypeError: If it is neither a tensor nor blocks by names.
        ValueError: If its numbers cannot be.
    """
    if not isinstance(given, Mapping):
        positive_definite("inverse_mass_matrix", given)
        return
    for names, part in given.items():
        positive_definite(f"inverse_mass_matrix[{names}]", part)


@dataclass(frozen=True)
class MassForm:
    """Which entries of a mass matrix may differ from zero.

    Arguments:
        blocks: The names of sites whose block is dense, as they are named together.
        rest: The other sites, in the order of their names; their block is diagonal.
        indices: Of each site, its coordinates in a position.
        arrowhead: Whether the mass itself has the dense sites as the head of an arrow: they are
            correlated with all, and the others among each other through them alone.

    Example:
        >>> real = torch.float64
        >>> b = Site("b", 0, 2, torch.Size([2]), None, real)
        >>> sites = [b, Site("a", 2, 3, torch.Size([]), None, real)]
        >>> form = mass_form([("b",)], sites, arrowhead=False)
        >>> form.shaped(torch.full((3, 3), 0.5) + torch.eye(3))
        tensor([[1.5000, 0.5000, 0.0000],
                [0.5000, 1.5000, 0.0000],
                [0.0000, 0.0000, 1.5000]])
        >>> list(form.by_name(torch.eye(3)))
        [('b',), ('a',)]
    """

    blocks: tuple[tuple[str, ...], ...]
    rest: tuple[str, ...]
    indices: Mapping[str, Tensor]
    arrowhead: bool

    @property
    def dense(self) -> bool:
        """Whether the mass is kept as a whole matrix."""
        return bool(self.blocks)

    @property
    def dimension(self) -> int:
        return sum(len(index) for index in self.indices.values())

    def shaped(self, covariance: Tensor) -> Tensor:
        """The inverse mass of this structure that is nearest to a covariance.

        Of all normal distributions whose precision has the structure, the one that is likeliest for
        draws of this covariance: it is positive definite if the covariance is.

        Arguments:
            covariance: Of shape ``(dimension, dimension)``, or ``(dimension,)`` its diagonal.
        """
        if covariance.dim() == 1 or not self.rest and len(self.blocks) == 1:
            return covariance
        result = torch.diag(covariance.diag())
        blocks = self._coordinates()
        if not self.arrowhead:
            for index in blocks[: len(self.blocks)]:
                result[index[:, None], index] = covariance[index[:, None], index]
            return result
        head, tail = torch.cat(blocks[: len(self.blocks)]), blocks[-1]
        cell, across = covariance[head[:, None], head], covariance[head[:, None], tail]
        scale = cell.diag().double().sqrt()  # which may differ by many orders of magnitude
        left = across.double() / scale[:, None]
        correlation = cell.double() / (scale[:, None] * scale)
        through = (left.mT @ torch.linalg.solve(correlation, left)).to(across)
        spread = result[tail, tail]
        result[tail[:, None], tail] = through
        result[tail, tail] = spread
        result[head[:, None], head] = cell
        result[head[:, None], tail], result[tail[:, None], head] = across, across.mT
        return result

    def by_name(self, inverse_mass: Tensor) -> dict[tuple[str, ...], Tensor]:
        """An inverse mass as Pyro keeps it: tuples of names, and their blocks or diagonals."""
        if self.arrowhead:
            index = torch.cat(self._coordinates())
            return {self._in_order(): inverse_mass[index[:, None], index]}
        parts = {}
        for names, index in zip((*self.blocks, self.rest), self._coordinates(), strict=True):
            if names in self.blocks:
                parts[names] = inverse_mass[index[:, None], index]
            elif names:
                whole = inverse_mass.dim() == 2
                parts[names] = (inverse_mass.diagonal() if whole else inverse_mass)[index]
        return parts

    def flat(self, given: InverseMass) -> Tensor:
        """An inverse mass in a position's order, from one in Pyro's form, or from one in order.

        Raises:
            ValueError: If names or shapes are not those of this structure.
        """
        dimension = self.dimension
        shape = (dimension, dimension) if self.dense else (dimension,)
        if isinstance(given, Tensor):
            if tuple(given.shape) != shape:
                raise ValueError(
                    f"`inverse_mass_matrix` has shape {tuple(given.shape)}: expected {shape}"
                )
            return given
        example = next(iter(given.values()), torch.zeros(()))
        expected = self.by_name(example.new_ones(shape))
        result = example.new_zeros(shape)
        if set(given) != set(expected):
            raise ValueError(
                f"`inverse_mass_matrix` names {list(given)}: expected {list(expected)}"
            )
        for names, part in given.items():
            if part.shape != expected[names].shape:
                raise ValueError(
                    f"`inverse_mass_matrix` of {names} has shape {tuple(part.shape)}: expected "
                    f"{tuple(expected[names].shape)}"
                )
            index = torch.cat([self.indices[name] for name in names])
            if part.dim() == 2:
                result[index[:, None], index] = part
            else:
                result[(index, index) if self.dense else index] = part
        return result

    def fill(self, adapter: Adapter, inverse_mass: Tensor) -> Adapter:
        """Puts an inverse mass into an adapter of Pyro's, to be read from there."""
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {}
        for names, index in zip((*self.blocks, self.rest), self._coordinates(), strict=True):
            if names:
                whole = names in self.blocks
                shapes[names] = (len(index), len(index)) if whole else (len(index),)
        options = {"dtype": inverse_mass.dtype, "device": inverse_mass.device}
        adapter.configure(shapes, adapt_mass_matrix=True, options=options)
        if isinstance(adapter, BlockMassMatrix):
            adapter.inverse_mass_matrix = self.by_name(inverse_mass)
            return adapter
        ((names, matrix),) = self.by_name(inverse_mass).items()
        mass = torch.linalg.inv(matrix.double()).to(matrix)
        head = sum(len(self.indices[n]) for block in self.blocks for n in block)
        adapter.mass_matrix = {names: SymmArrowhead(mass[:head], mass.diagonal()[head:])}
        return adapter

    def _coordinates(self) -> list[Tensor]:
        """For each block, and for the rest, the indices of its coordinates in a position."""
        none = torch.zeros(0, dtype=torch.long)
        return [
            torch.cat([none, *(self.indices[name] for name in names)])
            for names in (*self.blocks, self.rest)
        ]

    def _in_order(self) -> tuple[str, ...]:
        return tuple(name for names in self.blocks for name in names) + self.rest


def mass_form(
    full_mass: FullMass,
    sites: Sequence[Site],
    *,
    arrowhead: bool,
    given: InverseMass | None = None,
) -> MassForm:
    """The structure of a model's mass.

    Arguments:
        full_mass: As kernels take it. Undecided, it is that of the inverse mass that is given, or
            dense for up to 500 parameters.
        sites: The model's.
        arrowhead: Whether blocks are the head of an arrow.
        given: The inverse mass that is given, if any.

    Raises:
        ValueError: If a site is named that the model has not.
    """
    indices = {site.name: torch.arange(site.start, site.stop) for site in sites}
    names = tuple(sorted(indices))
    if full_mass == "auto":
        if given is not None:
            parts: Any = [given] if isinstance(given, Tensor) else given.values()
            full_mass = any(part.dim() == 2 for part in parts)
        else:
            full_mass = sum(map(len, indices.values())) <= _LARGEST_DENSE
    if isinstance(full_mass, bool):
        blocks: tuple[tuple[str, ...], ...] = (names,) if full_mass and names else ()
    else:
        blocks = tuple(tuple(block) for block in full_mass)
    dense = {name for block in blocks for name in block}
    unknown = sorted(dense - set(names))
    if unknown:
        raise ValueError(f"`full_mass` names {unknown}: expected names of the sites {list(names)}")
    rest = tuple(name for name in names if name not in dense)
    return MassForm(blocks, rest, indices, arrowhead and bool(blocks))
