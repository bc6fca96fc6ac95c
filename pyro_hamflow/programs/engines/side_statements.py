"""Numbers of several chains side by side, as variables of C++ that are vectors of one of each."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported
from pyro_hamflow.programs.engines.statements import Statements

# What an expression of numbers is where some of them are vectors, as ``sides.hpp`` has it.
_OF_VECTORS = [
    (re.compile(r"\b(double|float|bool)\("), r"as<\1>("),
    (re.compile(r"\bstd::pow\b"), "power"),
    (re.compile(r"\bstd::"), ""),
    (re.compile(r"\bsgn\b"), "sign_of"),
    (re.compile(r"\bmax_propagate_nan\b"), "larger"),
    (re.compile(r"\bmin_propagate_nan\b"), "smaller"),
    (re.compile(r"\bcalc_digamma\b"), "digamma"),
]


class SideStatements(Statements):
    """Statements that work out numbers of several chains at once.

    What depends on a chain's position is a vector of one number of each chain. All else depends on
    data alone, and is worked out once, by a function of its own. Nothing is put into memory.

    Arguments:
        most: How many lines there may be.
        dtype: The type of positions, and of all that is worked out of them but what is true or not.
    """

    one_each = True

    def __init__(self, most: int, dtype: torch.dtype) -> None:
        super().__init__(most)
        self._dtype = dtype
        self._vectors: set[int] = set()

    def positions(self, count: int) -> list[int]:
        """The numbers of a position."""
        found = self.region("z", self._dtype, range(count))
        self._vectors.update(found)
        return found

    def same_for_all(self, number: int) -> bool:
        return number not in self._vectors

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Buffer:
        raise NotSupported("numbers of several chains in memory")

    def made(self, text: str, needs: Sequence[int], dtype: torch.dtype, *after: int) -> int:
        if self._vectors.isdisjoint(needs):
            return super().made(text, needs, dtype, *after)
        if dtype not in (self._dtype, torch.bool):
            raise NotSupported(f"numbers of several chains of {dtype}")
        for pattern, other in _OF_VECTORS:
            text = pattern.sub(other, text)
        if (text, dtype) not in self._known:
            self._vectors.add(len(self.numbers))  # the next one
        return super().made(text, needs, dtype, *after)

    def text(self, name: str, results: Sequence[Sequence[int]]) -> str:
        """A namespace with ``prepare`` and ``call``: of data, and of positions.

        Arguments:
            name: The namespace's.
            results: The potential, and its gradient.
        """
        value, slope = results
        wanted = self._written([value, slope], "r{r}[{k}] = Numbers{{}} + {name};")
        of_vectors = [step for step in wanted if self._is_of_vectors(step)]
        of_data = [step for step in wanted if not self._is_of_vectors(step)]
        read = {number for step in of_vectors for number in self._steps[step].needs}
        kept = sorted(n for n in read - self._vectors if not self.numbers[n].is_constant)
        for number in kept:
            of_data.append(self.step([number], [f"c.v{number} = v{number};"]))
        prepared = self._chunk_text(of_data)
        self._places = {number: f"c.v{number}" for number in kept}
        return "\n".join(
            [
                f"namespace {name} {{",
                *("struct Data {", *(f"{self._kind(n)} v{n};" for n in kept), "};"),
                *("static void prepare(void* const* a, Data& c) {", *prepared, "}"),
                "template <class Numbers>",
                "static void call(const Data& c, const Numbers* z, Numbers* r0, Numbers* r1) {",
                *(*self._chunk_text(of_vectors), "}", "}"),
            ]
        )

    def _is_of_vectors(self, step: int) -> bool:
        """Whether a statement works out a vector, or writes a result."""
        made = self._steps[step].makes
        return made is None or made in self._vectors

    def _kind(self, number: int) -> str:
        return "auto" if number in self._vectors else super()._kind(number)
