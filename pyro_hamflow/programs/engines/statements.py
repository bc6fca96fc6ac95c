"""Numbers as variables of C++: each operation on one number is a statement.

Statements are written in functions of a few hundred each, which g++ goes through in as much time as
there are statements; of one long function it takes many times that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, UsesScratch, kind_of
from pyro_hamflow.programs.engines.regions import ZERO, Region, Regions
from pyro_hamflow.programs.engines.shared_loops import SharedLoops
from pyro_hamflow.programs.engines.sides import Sides

_IN_A_FUNCTION = 300


@dataclass(frozen=True)
class _Number:
    """A number: a text in C++ of other numbers.

    Attributes:
        dtype: Its type.
        text: The expression.
        needs: The numbers in it.
        step: Which statement has to come before it; none where memory is read that does not change.
        is_constant: Whether the text is a literal.
    """

    dtype: torch.dtype
    text: str
    needs: tuple[int, ...] = ()
    step: int | None = None
    is_constant: bool = False


@dataclass
class _Step:
    """A statement, or several that belong together.

    Attributes:
        makes: The number that it defines, if it is one.
        needs: The numbers that it reads.
        after: Steps that have to come before.
        lines: Its text.
    """

    makes: int | None
    needs: tuple[int, ...]
    after: tuple[int, ...]
    lines: list[str]


class Statements(UsesScratch):
    """Statements as they are written, each number once.

    Arguments:
        most: How many lines there may be.
        sides: As below.

    Attributes:
        scratch: How many bytes of memory they use.
        shared: The loops that they call.
        sides: Which of the numbers are vectors of one of each of several chains, if any are.
    """

    def __init__(self, most: int, sides: Sides | None = None) -> None:
        super().__init__()
        self._room = most
        self.sides = sides
        self.numbers = [_Number(torch.float64, "0", is_constant=True)]
        self.steps: list[_Step] = []
        self._known: dict[tuple[str, torch.dtype], int] = {}
        self._made_by: dict[int, int] = {}
        self._regions = Regions()
        self._copies: dict[tuple[tuple[int, ...], torch.dtype], tuple[Buffer, int]] = {}
        self.shared = SharedLoops()
        self.places: dict[int, str] = {}

    def constant(self, value: float, dtype: torch.dtype) -> int:
        """A number that is known."""
        if value == 0 and math.copysign(1.0, value) > 0:
            return ZERO
        if dtype == torch.bool:
            text = "true"
        elif math.isfinite(value):
            text = f"{kind_of(dtype)}({value!r})"
        else:
            text = "NAN" if math.isnan(value) else f"({'-' * (value < 0)}INFINITY)"
        return self._number(_Number(dtype, text, is_constant=True))

    def read(self, text: str, dtype: torch.dtype, step: int | None = None) -> int:
        """A number in memory, from some step on."""
        return self._number(_Number(dtype, text, step=step))

    def region(
        self, place: str, dtype: torch.dtype, places: Sequence[int], step: int | None = None
    ) -> list[int]:
        """Numbers at some places of memory, from some step on; it is known where they lie."""
        first = len(self.numbers)
        ids = [self.read(f"{place}[{k}]", dtype, step) for k in places]
        if ids == list(range(first, first + len(ids))):
            offsets = torch.tensor(places, dtype=torch.int64, device="cpu")
            self._regions.add(Region(first, dtype, place, offsets, step))
        return ids

    def where(self, ids: Tensor) -> tuple[Buffer, int | None] | None:
        """Where numbers lie, and the step that writes them there, if they do so evenly."""
        return self._regions.where(ids)

    def given(self, number: _Number) -> int:
        """A constant of other statements."""
        return self._number(number)

    def lines(self) -> list[str]:
        """All statements in order, those first that read."""
        reads = [
            f"const {kind_of(known.dtype)} v{number} = {known.text};"
            for number, known in enumerate(self.numbers)
            if not known.is_constant and number not in self._made_by
        ]
        return reads + [line for step in self.steps for line in step.lines]

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Buffer:
        if self.sides is not None:
            raise NotSupported("numbers of several chains in memory")
        return super().allocate(shape, strides, dtype)

    def made(self, text: str, needs: Sequence[int], dtype: torch.dtype, *after: int) -> int:
        """A number that is worked out of others, whose names are in a text."""
        vector = self.sides is not None and not self.sides.vectors.isdisjoint(needs)
        if self.sides is not None and vector:
            text = self.sides.expression(text, dtype)
        known = self._known.get((text, dtype))
        if known is not None:
            return known
        number = self._number(_Number(dtype, text, tuple(needs)))
        if self.sides is not None and vector:
            self.sides.vectors.add(number)
        kind = self.kind(number)
        self._made_by[number] = self.step(needs, [f"const {kind} v{number} = {text};"], after)
        self.steps[-1].makes = number
        return number

    def step(self, needs: Sequence[int], lines: list[str], after: Sequence[int] = ()) -> int:
        """Adds statements that are kept together; gives their number."""
        self._room -= len(lines)
        if self._room < 0:
            raise NotSupported("so many numbers")
        self.steps.append(_Step(None, tuple(needs), tuple(after), lines))
        return len(self.steps) - 1

    def name(self, number: int) -> str:
        """What a number is called in a statement."""
        known = self.numbers[number]
        return known.text if known.is_constant else f"v{number}"

    def stored(self, numbers: Sequence[int], dtype: torch.dtype) -> tuple[Buffer, int]:
        """Memory in which numbers lie in a row, and the step that writes them there."""
        buffer = self.allocate((len(numbers),), (1,), dtype)
        lines, needs, after = list[str](), list[int](), list[int]()
        place = 0
        while place < len(numbers):
            row = self._regions.row(numbers, place)
            if row is None:
                needs.append(numbers[place])
                lines.append(f"{buffer.place}[{place}] = {self.name(numbers[place])};")
            else:
                after += [] if row.step is None else [row.step]
                lines.append(row.copied(f"{buffer.place} + {place}"))
            place += 1 if row is None else row.length
        return buffer, self.step(needs, lines, after)

    def copied(self, numbers: Sequence[int], dtype: torch.dtype) -> tuple[Buffer, int]:
        """As :meth:`stored`, for what is only read there: once of the same numbers."""
        key = tuple(numbers), dtype
        if key not in self._copies:
            self._copies[key] = self.stored(numbers, dtype)
        return self._copies[key]

    def text(self, name: str, results: Sequence[Sequence[int]]) -> str:
        """A namespace with the function ``call``, that writes numbers to where they are wanted.

        Arguments:
            name: The namespace's.
            results: Of each result its numbers, in order.
        """
        wanted = self.written(results, "((Real*)r[{r}])[{k}] = {name};")
        chunks = _cut(wanted, lambda step: len(self.steps[step].lines))
        self._share(chunks)
        arguments = "void* const* a, char* w, void* const* r"
        parts = [
            "\n".join(
                [f"static __attribute__((noinline)) void part{i}({arguments}) {{", *lines, "}"]
            )
            for i, lines in enumerate(map(self.chunk_text, chunks))
        ]
        calls = [f"  part{i}(a, w, r);" for i in range(len(parts))]
        head = f"static void call({arguments}) {{"
        loops = self.shared.text()
        return "\n".join([f"namespace {name} {{", *loops, *parts, head, *calls, "}", "}"])

    def kind(self, number: int) -> str:
        """The type of a number, in C++."""
        if self.sides is not None and number in self.sides.vectors:
            return "auto"
        return kind_of(self.numbers[number].dtype)

    def written(self, results: Sequence[Sequence[int]], line: str) -> list[int]:
        """Adds lines that write results; gives all steps that these need, in order."""
        for r, numbers in enumerate(results):
            for k, number in enumerate(numbers):
                self.step([number], [line.format(r=r, k=k, name=self.name(number))])
        return self._wanted(sum(map(len, results)))

    def _number(self, number: _Number) -> int:
        key = number.text, number.dtype
        if key not in self._known:
            self._known[key] = len(self.numbers)
            self.numbers.append(number)
        return self._known[key]

    def _wanted(self, last: int) -> list[int]:
        """The steps that the last ones need, in order."""
        wanted = [False] * len(self.steps)
        for step in reversed(range(len(self.steps))):
            if step >= len(self.steps) - last:
                wanted[step] = True
            if wanted[step]:
                for before in self._before(self.steps[step]):
                    wanted[before] = True
        return [step for step, is_wanted in enumerate(wanted) if is_wanted]

    def _before(self, step: _Step) -> list[int]:
        found = list(step.after)
        for number in step.needs:
            maker = self._made_by.get(number, self.numbers[number].step)
            if maker is not None:
                found.append(maker)
        return found

    def _share(self, chunks: list[list[int]]) -> None:
        """Gives each number a place in memory that is used by a later function than its own."""
        self._chunk_of = {step: i for i, chunk in enumerate(chunks) for step in chunk}
        for i, chunk in enumerate(chunks):
            for step in chunk:
                for number in self.steps[step].needs:
                    maker = self._made_by.get(number)
                    if maker is None or self._chunk_of[maker] == i or number in self.places:
                        continue
                    kind = kind_of(self.numbers[number].dtype)
                    place = self.scratch + 8 * len(self.places)
                    self.places[number] = f"*({kind}*)(w + {place})"
        self.give_away(8 * len(self.places))

    def chunk_text(self, chunk: list[int]) -> list[str]:
        """The lines of a function; what is not made there is read where it is first needed."""
        lines: list[str] = []
        here: set[int] = set()
        for step in map(self.steps.__getitem__, chunk):
            for number in step.needs:
                known = self.numbers[number]
                if number not in here and not known.is_constant:
                    here.add(number)
                    text = self.places.get(number, known.text)
                    lines.append(f"const {self.kind(number)} v{number} = {text};")
            lines += step.lines
            if step.makes is not None:
                here.add(step.makes)
                if step.makes in self.places:
                    lines.append(f"{self.places[step.makes]} = v{step.makes};")
        return lines


def _cut(steps: list[int], size: Callable[[int], int]) -> list[list[int]]:
    """Steps in rows of a few hundred lines."""
    chunks: list[list[int]] = [[]]
    lines = 0
    for step in steps:
        if lines > _IN_A_FUNCTION:
            chunks.append([])
            lines = 0
        chunks[-1].append(step)
        lines += size(step)
    return chunks
