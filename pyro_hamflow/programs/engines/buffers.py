"""Tensors in the memory of a function in C++."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

KINDS = {
    torch.float64: "double",
    torch.float32: "float",
    torch.int64: "int64_t",
    torch.int32: "int32_t",
    torch.uint8: "uint8_t",
    torch.bool: "bool",
}

_LINE = 64  # bytes of a line of the cache


class NotSupported(Exception):
    """An operator that the engine has no code for, by its name."""


@dataclass(frozen=True)
class Buffer:
    """A tensor in the function's memory.

    Attributes:
        dtype: Its numbers' type.
        place: The expression for the address of its first number.
        shape: Its shape.
        strides: Its strides.
    """

    dtype: torch.dtype
    place: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def kind(self) -> str:
        """Its numbers' type in C++."""
        return kind_of(self.dtype)

    def at(self, indices: Sequence[str], *, last: int = 0) -> str:
        """The address at some indices; of the last dimensions, the first number."""
        strides = self.strides[: len(self.strides) - last]
        terms = [f"{index} * {s}" for index, s in zip(indices, strides, strict=True) if s]
        return f"({' + '.join([self.place, *terms])})"

    def empty(self) -> Tensor:
        """A tensor of this kind without any memory."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device="meta")


class UsesScratch:
    """A function in C++ that works in scratch memory, which its text calls ``w``.

    Attributes:
        scratch: How many bytes of it are given away.
        sizes: How many numbers each buffer spans, by its place.
    """

    def __init__(self) -> None:
        self.scratch = 0
        self.sizes: dict[str, int] = {}

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Buffer:
        """A buffer of its own."""
        spans = ((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        numbers = 1 if 0 in shape else 1 + sum(spans)
        place = f"(({kind_of(dtype)}*)(w + {self.scratch}))"
        self.give_away(numbers * dtype.itemsize)
        self.sizes[place] = numbers
        return Buffer(dtype, place, tuple(shape), tuple(strides))

    def give_away(self, size: int) -> None:
        """Counts so many bytes, in whole lines of the cache."""
        self.scratch += -(-size // _LINE) * _LINE


class Writer(Protocol):
    """A function in C++ that is being written."""

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Buffer:
        """A buffer of its own in scratch memory."""

    def emit(self, line: str) -> None:
        """Adds a statement."""


def kind_of(dtype: Any) -> str:
    """A type of torch's in C++."""
    if dtype not in KINDS:
        raise NotSupported(str(dtype))
    return KINDS[dtype]


def loops(sizes: Sequence[int]) -> tuple[str, list[str]]:
    """The heads of nested loops over so many numbers each, and their variables.

    Example:
        >>> loops([2])
        ('for (long i0 = 0; i0 < 2; i0++) ', ['i0'])
    """
    names = [f"i{number}" for number in range(len(sizes))]
    pairs = zip(names, sizes, strict=True)
    return "".join(f"for (long {n} = 0; {n} < {size}; {n}++) " for n, size in pairs), names
