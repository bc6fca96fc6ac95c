"""A function of one draw, run at many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.capture import Program, batch, capture, rows_at_once


class Rows:
    """Runs a function of one row at many: captured and batched, in Python where that fails.

    Arguments:
        function: From tensors to a tuple of tensors. It may raise at some rows.
        examples: Its arguments at a few rows, rows first.
        count: About how many rows it will be called with.

    Attributes:
        graph: The captured function of one row, or ``None``.
        failures: At how many rows the function has raised.
    """

    def __init__(self, function: Program, *examples: Tensor, count: int) -> None:
        self.function = function
        self.graph: torch.fx.GraphModule | None = None
        self.failures = 0
        self._program: Program | None = None
        try:
            with torch.no_grad():
                graph = capture(function, *[example[0] for example in examples])
                at_once = min(count, rows_at_once(graph))
                enough = [_to_length(example, at_once) for example in examples]
                program = batch(graph, *enough)
                if _agree(program(*enough), function, enough):
                    self.graph, self._program, self._at_once = graph, program, at_once
        except Exception:  # whatever a model's own code may raise while it is traced
            pass

    def readers(self, argument: int) -> set[int] | None:
        """Which results depend on an argument, by the graph; ``None`` if there is none."""
        if self.graph is None:
            return None
        nodes = list(self.graph.graph.nodes)
        reached = {[node for node in nodes if node.op == "placeholder"][argument]}
        for node in nodes[:-1]:
            if not reached.isdisjoint(node.all_input_nodes):
                reached.add(node)
        return {i for i, result in enumerate(nodes[-1].args[0]) if result in reached}

    def __call__(self, *inputs: Tensor) -> list[Tensor | None]:
        """Results at all rows, on the CPU.

        Arguments:
            inputs: The function's arguments, rows first.

        Returns:
            Each result of the function, rows first, NaN where the function has raised; ``None`` for
            one whose shape is not the same at all rows.
        """
        with torch.no_grad():
            if self._program is not None:
                try:
                    return self._all_at_once(self._program, inputs)
                except Exception:  # as of a factorisation that fails at one row and ends the batch
                    self._program = None
            return self._one_by_one(inputs)

    def _all_at_once(self, program: Program, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        pieces = []
        for start in range(0, len(inputs[0]), self._at_once):
            parts = [tensor[start : start + self._at_once] for tensor in inputs]
            results = program(*[_to_length(part, self._at_once) for part in parts])
            pieces.append([result[: len(parts[0])].cpu() for result in results])
        return [torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _one_by_one(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        rows: list[tuple[Tensor, ...] | None] = []
        for row in zip(*inputs, strict=True):
            try:
                rows.append(tuple(result.cpu() for result in self.function(*row)))
            except Exception as error:  # whatever a model's own code may raise at a draw
                rows.append(None)
                reason = error
        made = [row for row in rows if row is not None]
        if not made:
            raise reason
        self.failures += len(rows) - len(made)
        return [
            _stack([None if row is None else row[i] for row in rows]) for i in range(len(made[0]))
        ]


class Replicates:
    """A function of one draw and one noise, as a function of one draw and many noises.

    What depends on the draw alone is worked out once: of a path, the factors of its precision.

    Arguments:
        function: From a draw and noise to a tuple of tensors.
        examples: Both at a few rows, rows first.
    """

    def __init__(self, function: Program, *examples: Tensor) -> None:
        self._function = function
        self._graph: torch.fx.GraphModule | None = None
        try:
            with torch.no_grad():
                graph = capture(function, *[example[0] for example in examples])
                ends = [example[[0, -1]] for example in examples]
                if _agree(torch.func.vmap(graph)(*ends), function, ends):
                    self._graph = graph
        except Exception:  # whatever a model's own code may raise while it is traced
            pass

    def __call__(self, draw: Tensor, noises: Tensor) -> tuple[Tensor, ...]:
        """Results for each noise, these first."""
        if self._graph is not None:
            found: tuple[Tensor, ...] = tuple(torch.func.vmap(self._graph, (None, 0))(draw, noises))
            return found
        made = [self._function(draw, noise) for noise in noises]
        return tuple(torch.stack(parts) for parts in zip(*made, strict=True))


def _to_length(rows: Tensor, length: int) -> Tensor:
    """The first rows, and the very first again as often as it takes."""
    rows = rows[:length]
    return torch.cat([rows, rows[:1].expand(length - len(rows), *rows.shape[1:])])


def _agree(results: Any, function: Program, inputs: Sequence[Tensor]) -> bool:
    """Whether a batched program does what the function does, at the first row and the last."""
    for i in (0, -1):
        for batched, single in zip(results, function(*[row[i] for row in inputs]), strict=True):
            tolerance = 1e-9 if single.dtype == torch.float64 else 1e-3
            if batched[i].shape != single.shape or not torch.allclose(
                batched[i].double(), single.double(), tolerance, tolerance, equal_nan=True
            ):
                return False
    return True


def _stack(results: Sequence[Tensor | None]) -> Tensor | None:
    """One result at all rows, NaN where there is none."""
    made = [result for result in results if result is not None]
    if any(result.shape != made[0].shape for result in made):
        return None
    if len(made) == len(results):
        return torch.stack(made)
    missing = made[0].double() * torch.nan
    return torch.stack([missing if result is None else result.double() for result in results])
