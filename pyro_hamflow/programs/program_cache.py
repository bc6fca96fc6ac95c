"""Programs of one chain, made to serve many.

A program is captured once, for one chain, and checked against the function that it was captured
from; for each number of chains that asks for it, it is batched, and compiled where that is asked
for and pays. Where any of this fails, the function itself runs, more slowly, and a warning says so.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.agreement import all_equal, tolerance_of
from pyro_hamflow.programs.capture import (
    Program,
    batch,
    capture,
    first_result,
    in_blocks,
    largest_tensor,
    loop,
)
from pyro_hamflow.programs.captured import Captured
from pyro_hamflow.programs.compilation import SelfCompiling
from pyro_hamflow.programs.failures import Failures, first_line
from pyro_hamflow.programs.gaps import without_gaps_in_constants
from pyro_hamflow.programs.rounding import moves_by_rounding, same_but_for_rounding
from pyro_hamflow.programs.validation import no_validation

_CHECKS = (-1.0, 0.3, 2.0)  # times the point of capture
_CACHED = 2**16  # numbers in a tensor
_MOST_PROGRAMS = 128  # of one owner, beyond which its oldest are forgotten

Key = tuple[Any, ...]


class ChainFunctions(Protocol):
    """Functions of one chain's vectors, by their kinds: what a cache makes programs of.

    Attributes:
        example: A scalar of the type and on the device of all tensors.
    """

    example: Tensor

    def function(self, kind: str) -> Program:
        """The function of a kind, of one chain's vectors."""

    def examples(self, kind: str, num_chains: int) -> tuple[Tensor, ...]:
        """Arguments to capture a kind's program with, chains first."""

    def known_to_work(self, kind: str) -> tuple[Tensor, ...]:
        """Arguments of one chain that a kind's function is known to work with."""

    def from_middle(self, factor: float, position: Tensor) -> Tensor:
        """A position at which to compare a function with its program.

        Arguments:
            factor: How far from the middle of such positions, in multiples.
            position: The direction, of shape ``(dimension,)``.
        """

    def begins_gradient(self, kind: str) -> bool:
        """Whether a kind's results are the first of the gradient's."""

    def is_unchanged(self) -> bool:
        """Whether functions captured now are those of the programs shared with others."""


class ProgramCache:
    """Batched programs of functions of a position, a noise vector and more.

    Arguments:
        functions: The functions.
        compile_graphs: Whether to compile what is captured.

    Attributes:
        captured: What is captured; others may share it.
        fallback_reason: Why nothing could be captured, if so.
        failures: Where the model failed when it was run in Python.
    """

    def __init__(self, functions: ChainFunctions, *, compile_graphs: bool) -> None:
        self.functions = functions
        self.compile_graphs = compile_graphs
        self.fallback_reason: str | None = None
        self.failures = Failures()
        self.captured = Captured()
        self._looped = False
        self._most_rows: dict[str, float] = {}
        self._graphs: dict[tuple[str, int], Program] = {}
        self._programs: dict[tuple[str, int], Program] = {}
        self._owned: WeakKeyDictionary[object, dict[Key, Program]] = WeakKeyDictionary()

    @property
    def fallible(self) -> set[str]:
        """What in captured programs can fail, and gives NaN where it does."""
        return self.captured.fallible

    def program(self, kind: str, num_chains: int) -> Program:
        """A batched program, which compiles itself if that is asked for.

        Arguments:
            kind: One of the functions' kinds.
            num_chains: How many chains it serves.
        """
        rows = self.rows_at_once(kind, num_chains)
        if rows < num_chains:
            return in_blocks(self.program(kind, rows), rows)
        key = kind, num_chains
        if key not in self._programs:
            self._programs[key] = self._final(self.graph(kind, num_chains))
        return self._programs[key]

    def rows_at_once(self, kind: str, num_chains: int) -> int:
        """For how many chains a program runs at once: what it makes should stay in a cache.

        For all of them where no divisor of their number comes near to what a cache holds.
        """
        if kind not in self._most_rows:
            base = self.base("gradient" if self._is_part_of_gradient(kind) else kind)
            if base is None or self.functions.example.is_cuda:
                self._most_rows[kind] = math.inf
            else:
                self._most_rows[kind] = max(1, _CACHED // largest_tensor(base))
        most = self._most_rows[kind]
        rows = max(n for n in range(1, num_chains + 1) if num_chains % n == 0 and n <= most)
        return rows if 2 * rows >= most else num_chains

    def graph(self, kind: str, num_chains: int) -> Program:
        """The same program before compilation, to build larger programs from."""
        key = (kind, num_chains)
        if key not in self._graphs:
            self._graphs[key] = self._batch(kind, num_chains)
        return self._graphs[key]

    def _is_part_of_gradient(self, kind: str) -> bool:
        """Whether a kind's program is the beginning of the gradient's, which was captured."""
        return "gradient" in self.captured.bases and self.functions.begins_gradient(kind)

    def _batch(self, kind: str, num_chains: int) -> Program:
        if self._is_part_of_gradient(kind):
            gradient = self.graph("gradient", num_chains)
            if isinstance(gradient, GraphModule):
                return first_result(gradient)
        base = self.base(kind)
        if base is None:
            return loop(self._tolerant(kind, self.functions.function(kind)))
        known, key = self.captured.batched, (kind, num_chains)
        try:
            if key not in known:
                # Where the program of one chain was captured, which not every point may allow.
                examples = self.functions.examples(kind, 1)
                rows = (e.expand(num_chains, *e.shape[1:]).clone() for e in examples)
                known[key] = batch(base, *rows)
            return known[key]
        except RuntimeError as error:  # torch's for an operation that it cannot batch
            self._looped = True
            warnings.warn(
                "The model's graph could not be batched, so it runs once for each chain, more "
                f"slowly. The reason: {first_line(error)}",
                RuntimeWarning,
                stacklevel=2,
            )
            return loop(self._tolerant(kind, base))

    def _tolerant(self, kind: str, program: Program) -> Program:
        """A program of one chain for which a position where it fails has no density."""

        def failed() -> tuple[Tensor, ...]:
            value, *rest = program(*self.functions.known_to_work(kind))
            return torch.full_like(value, torch.inf), *(torch.zeros_like(part) for part in rest)

        return self.failures.tolerate(program, failed)

    def accelerate(self, owner: object, name: str, function: Program, *examples: Tensor) -> Program:
        """Captures a function around :meth:`graph` programs, once; compiled if that is asked for.

        Arguments:
            owner: Whose function it is; with it the program is forgotten.
            name: What the function does; with the examples' shapes it tells its functions apart.
            function: The function.
            examples: Arguments of the shapes that it will be called with.
        """
        looped = self._looped and not self.compile_graphs  # each chain would be written out
        if self.fallback_reason is not None or looped:
            return function
        programs = self._owned.setdefault(owner, {})
        key = key_of(name, *examples)
        if key not in programs:
            if len(programs) >= _MOST_PROGRAMS:
                programs.pop(next(iter(programs)))
            programs[key] = self._final(capture(function, *examples, flat=self.compile_graphs))
        return programs[key]

    def start_counting(self) -> None:
        """Has programs count their calls anew, so that a run compiles what its repetition does."""
        for programs in (self._programs, *self._owned.values()):
            for program in programs.values():
                if isinstance(program, SelfCompiling):
                    program.start_counting()

    def _final(self, graph: Program) -> Program:
        if self.compile_graphs and isinstance(graph, GraphModule):
            return SelfCompiling(graph)
        return graph

    def base(self, kind: str) -> GraphModule | None:
        """The captured program of one chain, or ``None`` where the model cannot be captured."""
        if self.fallback_reason is not None:
            return None
        if kind not in self.captured.bases:
            if not self.functions.is_unchanged():
                self.captured = self.captured.copy()  # others go on with what they share
            examples = [example[0] for example in self.functions.examples(kind, 1)]
            try:
                with no_validation():
                    graph = capture(self.functions.function(kind), *examples)
                self.fallible.update(graph.meta["fallible"])
                graph = self.captured.own(graph)
                self._check(kind, graph)
                graph = self._without_gaps(kind, graph)
            except Exception as error:  # whatever a model's own code may raise while it is traced
                self.fallback_reason = first_line(error)
                warnings.warn(
                    "The model could not be captured as a graph, so each chain runs it in Python, "
                    f"many times more slowly. The reason: {self.fallback_reason}",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return None
            self.captured.bases[kind] = graph
        return self.captured.bases[kind]

    def _check(self, kind: str, graph: GraphModule) -> None:
        """Compares a graph with the model at a few points, on all sides of zero.

        They may differ by rounding, which is told by what either gives where it rounds worse. Where
        the model fails, the graph may give any value but a finite one.
        """
        tolerance, one = tolerance_of(graph), self.functions.function(kind)
        for point in self._points(kind):
            captured = graph(*point)
            try:
                right = one(*point)
                same = all_equal(captured, right, tolerance)
                if not same:
                    ways = [moves_by_rounding(partial(way, *point)) for way in (graph, one)]
                    same = any(
                        same_but_for_rounding(
                            captured, right, list(map(torch.maximum, *moves)), tolerance
                        )
                        for moves in zip(*ways, strict=True)
                    )
            except Exception:  # whatever a model's own code may raise
                same = not bool(captured[0].isfinite())
            if not same:
                raise ValueError(
                    "the graph and the model disagree at another point, as they do when "
                    "the model's control flow depends on its latent variables"
                )

    def _without_gaps(self, kind: str, graph: GraphModule) -> GraphModule:
        """Closes gaps in covariates where they make a gradient no number, and nothing else."""
        value, *gradients = graph(*[example[0] for example in self.functions.examples(kind, 1)])
        if value.isnan() or not any(part.isnan().any() for part in gradients):
            return graph
        closed = without_gaps_in_constants(graph)
        tolerance = tolerance_of(graph)
        for examples in self._points(kind):
            old = graph(*examples)
            new = [
                torch.where(b.isnan(), b, a) for a, b in zip(closed(*examples), old, strict=True)
            ]
            if not all_equal(new, old, tolerance):
                return graph
        return closed

    def _points(self, kind: str) -> Iterator[tuple[Tensor, ...]]:
        """Arguments of one chain at a few points."""
        position, noise, *uniform = (part[0] for part in self.functions.examples(kind, 1))
        for factor in _CHECKS:
            yield self.functions.from_middle(factor, position), factor * noise, *uniform
        yield self.functions.known_to_work(kind)


def key_of(name: str, *examples: Tensor) -> Key:
    """What tells a function of this name for arguments of these shapes from others."""
    return (name, *(tuple(example.shape) for example in examples))
