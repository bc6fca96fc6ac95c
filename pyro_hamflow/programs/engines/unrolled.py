"""Graphs of many operations on few numbers each, as statements on single numbers.

A recurrence or the steps of a differential equation are thousands of operations on a number or
three. Inductor goes through each of them in hundredths of a second; here they are written down as
they are. What only moves numbers, as a selection or a stack, is done when the program is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch.fx import GraphModule, Interpreter
from torch.utils._pytree import tree_leaves, tree_map

from pyro_hamflow.programs.engines.blocks import in_memory, written
from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, kind_of
from pyro_hamflow.programs.engines.numbers import Numbers, known, name_of
from pyro_hamflow.programs.engines.operators import write_operation
from pyro_hamflow.programs.engines.picks import PICKS
from pyro_hamflow.programs.engines.side_text import text_of_sides
from pyro_hamflow.programs.engines.sides import Sides
from pyro_hamflow.programs.engines.statements import Statements
from pyro_hamflow.programs.engines.unrolled_rules import RULES
from pyro_hamflow.programs.failures import first_line


class Unrolled:
    """A function in C++ that does what a graph does, number by number.

    Arguments:
        graph: The graph, without constants.
        examples: Arguments of the shapes it will be called with.
        most: How many lines of C++ there may be.
        sides: Whether it is of several chains side by side: of one number of each as a vector.

    Attributes:
        needs_torch_headers: Whether it calls special functions of torch's.

    Raises:
        NotSupported: If an operation has no rule here, or there are too many numbers.
    """

    needs_torch_headers = False

    def __init__(
        self, graph: GraphModule, examples: Sequence[Tensor], most: int, *, sides: bool = False
    ) -> None:
        vectors = Sides(examples[0].dtype) if sides else None
        writer = self._writer = Statements(most, vectors)
        given = []
        for i, example in enumerate(examples):
            kind, count = kind_of(example.dtype), example.numel()
            position = vectors is not None and i == 0
            place = "z" if position else f"(({kind}*)a[{i}])"
            ids = writer.region(place, example.dtype, range(count))
            if vectors is not None and position:
                vectors.vectors.update(ids)
            given.append(Numbers(writer, ids, example.dtype, example.shape))
        try:
            with torch.no_grad():
                self._results = [known(writer, part) for part in _Writing(graph).run(*given)]
        except NotSupported:
            raise
        except Exception as error:  # a rule's, or torch's, for arguments of an unknown form
            raise NotSupported(first_line(error)) from error

    @property
    def scratch(self) -> int:
        """How many bytes its numbers take, once its text is written."""
        return self._writer.scratch

    def text(self, name: str) -> str:
        """A namespace with the function ``call``, as that of Inductor's kernels."""
        writer, rows = self._writer, [part.row for part in self._results]
        if writer.sides is not None:
            return text_of_sides(writer, writer.sides, name, rows)
        return writer.text(name, rows)


class _Writing(Interpreter):
    """Goes through a graph.

    Operations that have a rule do not go through torch's dispatcher: at the first tensor of a type
    of its own it imports what takes a second of a processor.
    """

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        name = name_of(target)
        if name in PICKS or name in RULES:
            for part in tree_leaves((args, kwargs)):
                if isinstance(part, Numbers):
                    return _apply(part.writer, target, args, kwargs)
        return super().call_function(target, args, kwargs)


def _apply(writer: Statements, func: Any, args: Any, kwargs: Any) -> Any:
    name = name_of(func)
    rule: Any = PICKS.get(name) or RULES.get(name)
    if rule is not None:
        found = rule(writer, func, *args, **kwargs)
        if found is not NotImplemented:
            return found
        func = torch.ops.pyro_hamflow.product.default
    found = _written_as_loops(writer, func, args, kwargs)
    if found is NotImplemented and (other := decomposition_table.get(func)) is not None:
        found = other(*args, **kwargs)
    if found is NotImplemented:
        found = func.decompose(*args, **kwargs)
    if found is NotImplemented:
        raise NotSupported(name)
    return found


Numbers.apply = staticmethod(_apply)


def _written_as_loops(writer: Statements, func: Any, args: Any, kwargs: Any) -> Any:
    """An operation that the engine has loops for, on numbers in a row in memory."""
    loops = _Loops(writer)
    try:
        args, kwargs = tree_map(loops.buffer, (args, kwargs))
        made = write_operation(loops, f"torch.ops.{func}", list(args), kwargs)
    except NotSupported:
        return NotImplemented
    step = writer.step([], loops.lines, loops.steps)

    def read(part: Buffer) -> Numbers:
        return Numbers(writer, written(writer, part, step), part.dtype)

    return tuple(map(read, made)) if isinstance(made, tuple) else read(made)


class _Loops:
    """Loops in memory, as operations write them."""

    def __init__(self, writer: Statements) -> None:
        self._writer = writer
        self.lines: list[str] = []
        self.steps: list[int] = []

    def allocate(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Buffer:
        return self._writer.allocate(shape, strides, dtype)

    def emit(self, line: str) -> None:
        self.lines.append(line)

    def buffer(self, part: Any) -> Any:
        """A tensor's numbers in memory; of what is none, itself."""
        if not isinstance(part, Tensor):
            return part
        whole = known(self._writer, part)
        found, step = in_memory(self._writer, whole.ids, whole.dtype)
        self.steps += [] if step is None else [step]
        return found
