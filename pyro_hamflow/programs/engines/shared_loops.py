"""Loops that differ in where their numbers lie alone: one function for all of them.

What is done at every step of a recurrence is the same loop each time, at other places. As calls of
one function, thousands of loops are as little work for the compiler as a few.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyro_hamflow.programs.engines.buffers import Buffer


class SharedLoops:
    """The functions of a program's loops."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, str], str] = {}

    def call(self, made: Buffer, given: Sequence[tuple[str, str]], body: str) -> str:
        """A call of a loop's function.

        Arguments:
            made: What the loop writes, to which nothing of what it reads belongs: its ``y``.
            given: The types of its other arguments, ``x0`` and so on, and what they are here.
            body: Its text.
        """
        kinds = ", ".join(f"{kind} x{i}" for i, (kind, _) in enumerate(given))
        head = ", ".join([f"{made.kind}* __restrict__ y", *([kinds] if kinds else [])])
        name = self._names.setdefault((head, body), f"loop{len(self._names)}")
        return f"{name}({', '.join([made.place, *(text for _, text in given)])});"

    def text(self) -> list[str]:
        """All functions."""
        return [
            f"static __attribute__((noinline)) void {name}({head}) {{ {body} }}"
            for (head, body), name in self._names.items()
        ]


def joined_dimensions(
    shape: Sequence[int], *strides: Sequence[int]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """A shape, and strides in it, with one dimension for those that lie one behind the other.

    Example:
        >>> joined_dimensions([2, 15], [15, 1], [15, 1])
        ((30,), [(1,), (1,)])
        >>> joined_dimensions([2, 15], [15, 1], [0, 1])
        ((2, 15), [(15, 1), (0, 1)])
    """
    sizes, kept = list[int](), list[list[int]]()
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if kept and all(
            before == size * step for before, step in zip(kept[-1], steps, strict=True)
        ):
            sizes[-1] *= size
            kept[-1] = steps
        else:
            sizes.append(size)
            kept.append(steps)
    columns = [tuple(row[i] for row in kept) for i in range(len(strides))]
    return tuple(sizes), columns
