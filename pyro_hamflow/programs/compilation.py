"""Machine code for captured programs, once it has paid to make it."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from pyro_hamflow.programs.agreement import same_but_for_order
from pyro_hamflow.programs.capture import Program, sizes_made

_EACH, _NUMBER = 2e-6, 0.7e-9  # seconds that an operation takes, and each number that it makes
_COMPILER, _COMPILED_EACH = 4.0, 0.03  # seconds to compile a graph, and each operation of it
# Of the calls that take as long as to compile, made before it is compiled. What a run calls a few
# hundred times, while it tunes, is never compiled; what draws call is, while warm-up lasts: with a
# tenth in place of a fiftieth, eight schools were compiled among their draws.
_PATIENCE = 0.02
_MOST = 2500  # operations: of more that follow each other the compiler may not come to an end

_OPTIONS = {
    # Checks of the inputs' strides cost more than a small gradient does.
    "size_asserts": False,
    "alignment_asserts": False,
    # Short loops, as over the visits of a subject, are vectorised too: a quarter faster.
    "cpp.enable_tiling_heuristics": False,
    # Parts that are joined are written where they belong, not selected at every element.
    "max_pointwise_cat_inputs": 0,
}

# What writes to places of a tensor, of which Inductor makes a write in place: where one number
# stands for all places, it writes to that.
_WRITES = {"diagonal_scatter", "index_add", "index_copy", "index_fill", "index_put"}


class SelfCompiling:
    """A captured program that compiles itself once it has been called often enough.

    Arguments:
        graph: The program.
    """

    def __init__(self, graph: GraphModule) -> None:
        self.graph = graph
        is_short = len(sizes_made(graph)) <= _MOST
        self._enough = _PATIENCE * calls_to_pay(graph) // 1 if is_short else math.inf
        self._compiled: Program | None = None
        self.start_counting()

    @property
    def is_compiled(self) -> bool:
        """Whether calls run machine code by now."""
        return self._compiled is not None and self._calls >= self._enough

    def start_counting(self) -> None:
        """Counts calls from here on: what was compiled before is used when it would be again."""
        self._calls = 0

    def __call__(self, *inputs: Tensor) -> Any:
        if self._calls < self._enough:
            self._calls += 1
            return self.graph(*inputs)
        if self._compiled is None:
            self._compiled = compile_graph(self.graph, *inputs)
        return self._compiled(*inputs)


def calls_to_pay(graph: GraphModule) -> float:
    """How many calls take as long as to compile the graph, roughly.

    By the number of its operations and of the numbers that they make, not by a clock, so that what
    is compiled in a run is compiled when it is repeated.
    """
    compiler = _COMPILER + _COMPILED_EACH * len(sizes_made(graph))
    return compiler / max(seconds_of(graph), _EACH)


def seconds_of(graph: GraphModule, rows: int = 1) -> float:
    """How long a call of the graph takes, roughly, without compilation.

    Arguments:
        graph: The graph.
        rows: For how many rows it is called at once, where it is made for one.
    """
    sizes = sizes_made(graph)
    return _EACH * len(sizes) + _NUMBER * rows * sum(sizes)


def compile_graph(graph: GraphModule, *examples: Tensor) -> Program:
    """Compiles a graph to machine code, or returns it as it is where no compiler works.

    So it does where machine code gives other results for the examples.

    Arguments:
        graph: The graph.
        examples: Arguments of the shapes it will be called with.

    Returns:
        A function of the same arguments and results.
    """
    try:
        import torch._inductor as inductor  # here, for it takes a second to import

        dense: list[Any] = [example.contiguous() for example in examples]
        with torch.no_grad():
            with inductor.config.patch(_OPTIONS), writing_before_reading():
                compiled = inductor.compile(writing_to_copies(graph), dense)
            results = [tree_leaves(program(*dense)) for program in (compiled, graph)]
        if not same_but_for_order(*results):
            raise RuntimeError("machine code and graph do not agree")
    except Exception as error:  # the compiler's failures have many types; none may end a run
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(
            f"Compilation failed ({reason[:200]}); sampling goes on without it, more slowly.",
            RuntimeWarning,
            stacklevel=2,
        )
        return graph

    def run(*inputs: Tensor) -> Any:
        return compiled(*[tensor.contiguous() for tensor in inputs])

    return run


@contextmanager
def writing_before_reading() -> Iterator[None]:
    """Keeps what Inductor writes in place before what reads it.

    Where it joins loops of different shapes, it finds anew what they read, and takes what was
    written in place for what was there before: gradients of groups were read before they were added
    up.
    """
    from torch._inductor.scheduler import SchedulerNode  # here, for it takes a second to import

    loop: Any = SchedulerNode
    find_anew = loop.recompute_size_and_body

    def find_what_is_written(node: Any, *args: Any, **keywords: Any) -> None:
        find_anew(node, *args, **keywords)
        names = getattr(node, "mutation_renames", {})  # not known to versions of long ago
        node.set_read_writes(node.read_writes.rename(names))

    loop.recompute_size_and_body = find_what_is_written
    try:
        yield
    finally:
        loop.recompute_size_and_body = find_anew


def writing_to_copies(graph: GraphModule) -> GraphModule:
    """The same graph, in which what writes to places of a tensor writes to a copy of all of it."""
    if not any(_writes(node) for node in graph.graph.nodes):
        return graph
    changed = GraphModule(graph, copy.deepcopy(graph.graph))
    for node in changed.graph.nodes:
        if _writes(node):
            with changed.graph.inserting_before(node):
                whole: dict[str, Any] = {"memory_format": torch.contiguous_format}
                node.update_arg(0, changed.graph.call_function(torch.clone, node.args[:1], whole))
    changed.recompile()
    return changed


def _writes(node: Node) -> bool:
    name = getattr(node.target, "__name__", "")  # also with the overload's behind a point
    return node.op == "call_function" and name.split(".")[0] in _WRITES
