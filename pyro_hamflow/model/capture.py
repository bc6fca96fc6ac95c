"""Tensor programs, captured once and replayed without Python.

A gradient of a small Pyro model costs milliseconds, nearly all of it spent in Python: handlers,
distributions, autograd. The arithmetic takes microseconds. :func:`capture` runs a function once and
records the tensor operations it performs, those of its autograd calls included, as one flat graph;
:func:`batch` gives every argument a leading chain dimension; :func:`compile_graph` turns the graph
into machine code. What a captured program returns at new inputs is what the function would return,
as long as the function's control flow does not depend on the values of its inputs.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

Program = Callable[..., Any]


_OPTIONS = {
    # Checks of the inputs' strides cost more than a small gradient does.
    "size_asserts": False,
    "alignment_asserts": False,
    # Short loops, as over the visits of a subject, are vectorised too: a quarter faster.
    "cpp.enable_tiling_heuristics": False,
    # Parts that are joined are written where they belong, not selected at every element.
    "max_pointwise_cat_inputs": 0,
}


def capture(function: Program, *examples: Tensor) -> GraphModule:
    """Records the tensor operations of a function as a flat graph.

    In-place operations are replaced by pure ones, and what depends on no argument (the data's
    share of the work) is computed now, once.

    Arguments:
        function: Any function of tensors; it may call :func:`torch.autograd.grad`.
        examples: Arguments to run it with, of the shapes and types it will be called with.

    Returns:
        The graph as a module with the same arguments and results.

    Example:
        >>> square = capture(lambda x: x * x, torch.tensor(3.0))
        >>> square(torch.tensor(5.0))
        tensor(25.)
    """
    # Tracing tells arguments apart by identity: one tensor given twice would be one argument.
    examples = tuple(example.clone() for example in examples)
    # Views are replayed, not re-strided, in gradients of in-place writes: that can be batched.
    with torch.autograd.grad_mode._force_original_view_tracking(True):
        recorded = make_fx(function)(*examples)
    pure = make_fx(torch.func.functionalize(recorded))(*examples)
    return _simplify(pure)


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
        # Shapes alone are traced: nothing of the batch's size is computed, or held, until it runs.
        tracer = make_fx(
            torch.func.functionalize(torch.func.vmap(graph)),
            decomposition_table={_SOLVE: _solve_together},
            tracing_mode="fake",
            _allow_non_fake_inputs=True,
        )
        return _simplify(tracer(*examples), fills=True)


def loop(function: Program) -> Program:
    """Runs a program of one chain for each of many; what :func:`batch` does, without a graph."""

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = [function(*single) for single in zip(*inputs, strict=True)]
        return tuple(torch.stack(parts) for parts in zip(*results, strict=True))

    return run


def compile_graph(graph: GraphModule, *examples: Tensor) -> Program:
    """Compiles a graph to machine code, or returns it as it is where no compiler works.

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
            with inductor.config.patch(_OPTIONS):
                compiled = inductor.compile(graph, dense)
            compiled(*dense)
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


_SOLVE = torch.ops.aten.linalg_solve_triangular.default


def _solve_together(triangle: Tensor, right: Tensor, *, left: bool = True, **settings: bool) -> Any:
    """Solves for a whole batch as for one matrix where all share a triangle.

    The operation itself would copy the triangle for each of the batch.
    """
    if triangle.shape[:-2].numel() != 1 or not triangle.dim() <= right.dim() > 2:
        return NotImplemented
    folded = right.movedim(-2, 0) if left else right
    matrix = folded.reshape(len(folded), -1) if left else folded.reshape(-1, folded.shape[-1])
    solved = _SOLVE(triangle.reshape(triangle.shape[-2:]), matrix, left=left, **settings)
    return solved.reshape(folded.shape).movedim(0, -2) if left else solved.reshape(folded.shape)


def _simplify(module: GraphModule, *, fills: bool = False) -> GraphModule:
    """Computes what depends on no input, once; drops what is repeated, unused or does nothing.

    Tensors of zeros or ones are such constants too, in graphs that will not be batched any more:
    some rules of batching rely on the gradient of a result to have its shape.
    """
    constants: dict[Node, Any] = {}
    simple = Graph()
    copies: dict[Node, Node] = {}
    seen: dict[Any, Node] = {}
    buffers: dict[str, Tensor] = {}

    def copy_of(node: Node) -> Node:
        if node not in copies:
            name = f"constant_{len(buffers)}"
            buffers[name] = constants[node]
            copies[node] = simple.get_attr(name)
        return copies[node]

    for node in module.graph.nodes:
        if node.op == "get_attr":
            constants[node] = operator.attrgetter(node.target)(module).detach()
        elif node.op != "call_function" or _is_random(node):
            copies[node] = simple.node_copy(node, copy_of)
        elif fills and node.target in _FILLS and isinstance(node.meta.get("val"), Tensor):
            value = node.meta["val"]
            one = torch.empty((), dtype=value.dtype, device=value.device)
            constants[node] = node.target(one).expand(value.shape)
        elif all(source in constants for source in node.all_input_nodes):
            arguments = map_arg((node.args, node.kwargs), constants.__getitem__)
            with torch.no_grad():
                constants[node] = node.target(*arguments[0], **arguments[1])
        elif (source := _same_as(node)) is not None:
            copies[node] = copy_of(source)
        elif (factors := _product_of_transposes(node)) is not None:
            left, right = (copy_of(factor) for factor in factors)
            turned = simple.call_function(torch.ops.aten.permute.default, (left, [1, 0]))
            copies[node] = simple.node_copy(node, copy_of)
            copies[node].target, copies[node].args = _PRODUCT, (right, turned)
        else:
            key = repr((node.target, map_arg((node.args, node.kwargs), copy_of)))
            if key not in seen:
                seen[key] = simple.node_copy(node, copy_of)
                if node.target in _VIEWS:  # their source may have lost the clone they rely on
                    seen[key].target = torch.ops.aten.reshape.default
            copies[node] = seen[key]
    simple.eliminate_dead_code()
    simple.lint()
    root = torch.nn.Module()
    for name, tensor in buffers.items():
        root.register_buffer(name, tensor)
    return GraphModule(root, simple)


_FILLS = {torch.ops.aten.zeros_like.default, torch.ops.aten.ones_like.default}
_COPIES = {
    torch.ops.aten.detach.default,
    torch.ops.aten.alias.default,
    torch.ops.aten.clone.default,
    torch.ops.aten.lift_fresh_copy.default,
}
_VIEWS = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default}
_SHAPES = {*_VIEWS, torch.ops.aten.reshape.default, torch.ops.aten.expand.default}


def _same_as(node: Node) -> Node | None:
    """The argument that a node returns as it is, if it does no more than that."""
    arguments: Any = node.args
    if node.target in _COPIES:
        return arguments[0]
    if node.target == torch.ops.aten.permute.default:
        return arguments[0] if list(arguments[1]) == sorted(arguments[1]) else None
    if node.target == torch.ops.aten.copy.default:
        source = arguments[1]
    elif node.target in _SHAPES:
        source = arguments[0]
    else:
        return None
    before, after = source.meta.get("val"), node.meta.get("val")
    if before is None or after is None:
        return None
    return source if (before.shape, before.dtype) == (after.shape, after.dtype) else None


_PRODUCT = torch.ops.aten.mm.default


def _product_of_transposes(node: Node) -> tuple[Node, Node] | None:
    """A and B, if a node is the transpose of A times the transpose of B.

    Batches of a matrix times a vector come so. As B times the transpose of A, each of a batch has a
    row of its own, over which later operations run faster.
    """
    if not _is_transpose(node):
        return None
    product: Any = node.args[0]
    if product.target != _PRODUCT or not _is_transpose(product.args[1]):
        return None
    return product.args[0], product.args[1].args[0]


def _is_transpose(node: Any) -> bool:
    return node.target == torch.ops.aten.permute.default and list(node.args[1]) == [1, 0]


def _is_random(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
