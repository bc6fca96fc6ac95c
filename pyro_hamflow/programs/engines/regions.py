"""Which numbers of a program lie in memory beside each other, so that a loop can go over them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.programs.engines.buffers import Buffer

ZERO = 0  # the number that is zero, of every type
_ROW = 4  # numbers that lie in a row, from which on they are copied in a loop


class Region(NamedTuple):
    """Numbers one after the other that lie in memory.

    Attributes:
        first: The first of them.
        dtype: Their type.
        place: The memory.
        places: Where each lies there.
        step: Which statement writes them.
    """

    first: int
    dtype: torch.dtype
    place: str
    places: Tensor
    step: int | None


class Row(NamedTuple):
    """Numbers that lie in a row.

    Attributes:
        length: How many.
        place: The address of the first; none of zeros.
        step: Which statement writes them.
    """

    length: int
    place: str | None
    step: int | None

    def copied(self, to: str) -> str:
        """A statement that writes them to an address."""
        if self.place is None:
            return f"std::fill_n({to}, {self.length}, 0);"
        return f"std::copy_n({self.place}, {self.length}, {to});"


class Regions:
    """All memory of which it is known which numbers lie there."""

    def __init__(self) -> None:
        self._found: list[Region] = []

    def add(self, region: Region) -> None:
        """Adds one of later numbers than all before."""
        self._found.append(region)

    def where(self, ids: Tensor) -> tuple[Buffer, int | None] | None:
        """Where numbers lie, and the step that writes them there, if they do so evenly."""
        first, last = int(ids.min()), int(ids.max())
        region = self._of(first)
        if region is None or last >= region.first + len(region.places):
            return None
        places = region.places[ids - region.first]
        start, strides = int(places.reshape(-1)[0]), list[int]()
        even = torch.full_like(places, start)
        for dim, size in enumerate(ids.shape):
            beside = places.movedim(dim, 0)[min(1, size - 1)].reshape(-1)[0]
            strides.append(int(beside) - start)
            along = torch.arange(size, device="cpu") * strides[-1]
            even += along.reshape([-1 if d == dim else 1 for d in range(ids.dim())])
        # Steps backwards, as of what is flipped, are lost where shapes are worked out by torch.
        if min(strides, default=0) < 0 or not torch.equal(even, places):
            return None
        shape, place = tuple(ids.shape), f"({region.place} + {start})"
        return Buffer(region.dtype, place, shape, tuple(strides)), region.step

    def row(self, numbers: Sequence[int], first: int) -> Row | None:
        """The row that begins with one of some numbers, of zeros or in memory; none if short."""
        number, length = numbers[first], 1
        step = 0 if number == ZERO else 1
        while first + length < len(numbers) and numbers[first + length] == number + step * length:
            length += 1
        if length < _ROW:
            return None
        if number == ZERO:
            return Row(length, None, None)
        region = self._of(number)
        if region is None:
            return None
        places = region.places[number - region.first :][:length]
        beside = int(places[0]) + torch.arange(len(places), device="cpu")
        if len(places) < _ROW or not torch.equal(places, beside):
            return None
        return Row(len(places), f"{region.place} + {int(places[0])}", region.step)

    def _of(self, number: int) -> Region | None:
        """The memory in which a number lies, if it is one of many there."""
        at = bisect_right(self._found, number, key=lambda region: region.first) - 1
        if at < 0:
            return None
        region = self._found[at]
        return region if number < region.first + len(region.places) else None
