"""Tensor programs, captured once and replayed without Python.

A gradient of a small Pyro model costs milliseconds, nearly all of it spent in Python: handlers,
distributions, autograd. The arithmetic takes microseconds. :func:`capture` runs a function once and
records the tensor operations it performs, those of its autograd calls included, as one flat graph;
:func:`batch` gives every argument a leading chain dimension;
:mod:`~pyro_hamflow.programs.compilation` turns the graph into machine code. What a captured program
returns at new inputs is what the function would return, as long as the function's control flow does
not depend on the values of its inputs.
"""

from __future__ import annotations

import itertools
import operator
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from pyro_hamflow.process import collecting_later
from pyro_hamflow.programs.forced_failure import FailAt
from pyro_hamflow.programs.graph_recorder import Recorder
from pyro_hamflow.programs.joining import joined
from pyro_hamflow.programs.pure_recorder import PureRecorder
from pyro_hamflow.programs.recording import PART, Recording
from pyro_hamflow.programs.replay import replay
from pyro_hamflow.programs.rules import BATCHED, PURE, UNFAILING

Program = Callable[..., Any]


_ROWS = 1000  # of a program that are run at once, at most
ELEMENTS = 2**18  # of a tensor, beyond which memory is what takes the time
_LARGE = 30_000  # numbers in a tensor, from which on it is slower to compute than to pretend

_MOST_CHECKS = 20  # of factorisations that are made to fail, one at a time; more are in loops


@collecting_later()
def capture(
    function: Program, *examples: Tensor, live: bool = False, flat: bool = True
) -> GraphModule:
    """Records the tensor operations of a function as a graph.

    In-place operations are replaced by pure ones, and what depends on no argument (the data's
    share of the work) is computed now, once. Where the function would raise because a matrix does
    not allow what is asked of it, as a Cholesky factor, the graph gives NaN; what can fail so, it
    names in ``meta["fallible"]``.

    Arguments:
        function: Any function of tensors; it may call :func:`torch.autograd.grad`.
        examples: Arguments to run it with, of the shapes and types it will be called with.
        live: Whether gradients of the graph's results shall be those of the function's, also in
            tensors that it gets from elsewhere; otherwise these are constants.
        flat: Whether a captured program that the function calls is copied into the graph. If not,
            it is called there; but several are copied, and what they share is done once.

    Returns:
        The graph as a module with the same arguments and results.

    Raises:
        RuntimeError: If Python asks for values or shapes that depend on the arguments, if the
            function catches such a failure, or if a live graph would lose gradients of its own.

    Example:
        >>> square = capture(lambda x: x * x, torch.tensor(3.0))
        >>> square(torch.tensor(5.0))
        tensor(25.)
    """
    # Tracing tells arguments apart by identity: one tensor given twice would be one argument.
    examples = tuple(example.clone() for example in examples)
    recorder = Recorder(UNFAILING, live=live)
    # Views are replayed, not re-strided, in gradients of in-place writes: that can be batched.
    with torch.autograd.grad_mode._force_original_view_tracking(True):
        result = recorder.record(function, *examples)
    constants = recorder.constants()
    if live and _has_gradient_of_its_own(result, constants.values()):
        raise RuntimeError("a function with a gradient of its own cannot be recorded by its value")
    for number, name in itertools.islice(recorder.fallible.items(), _MOST_CHECKS):
        if _goes_on(function, examples, number):
            raise RuntimeError(f"the function goes on in another way where {name} fails")
    flat = flat or len(recorder.graph.find_nodes(op="call_function", target=PART)) > 1
    simple = PureRecorder(PURE, live=live, flat=flat)
    with torch.no_grad():
        pure = torch.func.functionalize(partial(replay, recorder.graph))
        simple.record(partial(pure, constants), *examples)
    graph = simple.module()
    graph.meta["fallible"] = set(recorder.fallible.values())
    return graph if live else joined(graph, *examples)


def _goes_on(function: Program, examples: tuple[Tensor, ...], number: int) -> bool:
    """Whether a function catches the failure of a factorisation, and so has more than one way.

    A function may itself record one: a failure that such an outer check asks for is not this one's.
    """
    check = FailAt(number)
    try:
        with check:
            function(*examples)
    except Exception:  # as it is or as another
        if check.has_failed:
            return False
        raise
    return check.has_failed


def _has_gradient_of_its_own(result: Any, constants: Iterable[Tensor]) -> bool:
    """Whether a :class:`torch.autograd.Function` stands between constants and a result."""
    seen: set[Any] = {None, *(constant.grad_fn for constant in constants)}
    waiting = [part.grad_fn for part in tree_leaves(result)]
    while waiting:
        if (node := waiting.pop()) not in seen:
            if isinstance(node, BackwardCFunction):
                return True
            seen.add(node)
            waiting += [source for source, _ in node.next_functions]
    return False


@collecting_later()
def batch(graph: Program, *examples: Tensor) -> GraphModule:
    """Gives every argument and result of a program a leading batch dimension.

    Arguments:
        graph: The program for one element.
        examples: Arguments with the leading dimension; the result serves this batch size alone.

    Returns:
        The batched graph.
    """
    with warnings.catch_warnings():
        # An operation without a batching rule is looped over: slower, and as right.
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet.*")
        if not isinstance(graph, GraphModule) or largest_tensor(graph) * len(examples[0]) > _LARGE:
            # Shapes alone are traced: nothing of the batch's size is computed, or held.
            fake = FakeTensorMode(allow_non_fake_inputs=True)
            examples = tuple(fake.from_tensor(example) for example in examples)
        try:
            return _record_batched(torch.func.vmap(graph, randomness="different"), *examples)
        except RuntimeError:  # torch's for an operation that it cannot batch
            if not isinstance(graph, GraphModule):
                raise
            return _record_batched(_ByOperation(graph).run, *examples)


def _record_batched(function: Program, *examples: Tensor) -> GraphModule:
    recorder = PureRecorder(BATCHED)
    recorder.record(torch.func.functionalize(function), *examples)
    return recorder.module()


class _ByOperation(Interpreter):
    """Runs a graph for a batch, one operation after the other: row by row where it must be.

    All its nodes have a batch dimension but the constants.
    """

    def run_node(self, node: Node) -> Any:
        if node.op == "output":
            rows = len(next(iter(self.env.values())))

            def batched(part: Node) -> Any:
                value = self.env[part]
                return value.expand(rows, *value.shape) if part.op == "get_attr" else value

            return map_arg(node.args[0], batched)
        if node.op != "call_function" or node.target is operator.getitem:
            return super().run_node(node)
        moving = [source for source in node.all_input_nodes if source.op != "get_attr"]

        def one(*parts: Tensor) -> Any:
            known = dict(zip(moving, parts, strict=True))
            get = lambda source: known[source] if source in known else self.env[source]  # noqa: E731
            args, kwargs = map_arg((node.args, node.kwargs), get)
            return cast(Program, node.target)(*args, **kwargs)

        return over_rows(one, *(self.env[source] for source in moving))


def over_rows(function: Program, *inputs: Tensor) -> Any:
    """Applies a function to each row of its arguments, at once where its operations allow it."""
    try:
        return torch.func.vmap(function, randomness="different")(*inputs)
    except RuntimeError:
        return row_by_row(function, *inputs)


def row_by_row(function: Program, *inputs: Tensor) -> Any:
    """Applies a function to one row of its arguments after the other, and stacks the results."""
    results = [function(*row) for row in zip(*inputs, strict=True)]
    return tree_map(lambda *parts: torch.stack(parts), *results)


def batched_graph(graph: GraphModule, *inputs: Tensor) -> Any:
    """Runs a graph for a batch, as a whole if its operations allow it."""
    try:
        return torch.func.vmap(graph, randomness="different")(*inputs)
    except RuntimeError:  # torch's for an operation that it cannot batch
        return _ByOperation(graph).run(*inputs)


@collecting_later()
def first_result(graph: GraphModule) -> GraphModule:
    """A program's first result alone, without what only the others need.

    It takes one argument more than the program, and does nothing with it.
    """
    shorter = Graph()
    results = cast(tuple[Node, ...], shorter.graph_copy(graph.graph, {}))
    with shorter.inserting_before(next(n for n in shorter.nodes if n.op != "placeholder")):
        shorter.placeholder("ignored")
    shorter.output((results[0],))
    shorter.eliminate_dead_code()
    return Recording(graph, shorter)


@collecting_later()
def result_of(graph: GraphModule, number: int) -> GraphModule:
    """One of a program's results, without what only the others need."""
    shorter = Graph()
    results = cast(tuple[Node, ...], shorter.graph_copy(graph.graph, {}))
    shorter.output(results[number])
    shorter.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return Recording(graph, shorter)


def largest_tensor(graph: GraphModule) -> int:
    """How many numbers the largest tensor has that a captured program makes on its way."""
    return max(sizes_made(graph), default=1) or 1


def rows_at_once(graph: GraphModule) -> int:
    """How many rows to run a program of one row for at once."""
    return max(1, min(_ROWS, ELEMENTS // largest_tensor(graph)))


def sizes_made(graph: GraphModule) -> list[int]:
    """How many numbers each operation makes."""
    made = [n for n in graph.graph.nodes if n.op == "call_function" and "kind" in n.meta]
    return [node.meta["kind"][0].numel() for node in made]


def in_blocks(program: Program, rows: int) -> Program:
    """Runs a program of so many rows for a multiple of them, one block after the other."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        blocks = zip(*(tensor.split(rows) for tensor in inputs), strict=True)
        results = zip(*(program(*block) for block in blocks), strict=True)
        return tuple(torch.cat(parts) for parts in results)

    return run


def loop(function: Program) -> Program:
    """Runs a program of one chain for each of many; what :func:`batch` does, without a graph."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        return row_by_row(function, *inputs)

    return run
