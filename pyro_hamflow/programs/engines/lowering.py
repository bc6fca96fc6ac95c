"""A captured graph as the source of C++ kernels, by Inductor."""

from __future__ import annotations

import ast
import logging
import threading
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from pyro_hamflow.process import collecting_later
from pyro_hamflow.programs.compilation import writing_before_reading, writing_to_copies
from pyro_hamflow.programs.engines import factors
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.decompositions import DECOMPOSITIONS
from pyro_hamflow.programs.engines.narrow import costly_kept, repeated_late

_OPTIONS: dict[str, Any] = {
    # Loops over numbers, which g++ makes vectors of: Inductor's own vectors need torch's headers,
    # which take ten seconds to read.
    "cpp.simdlen": 1,
    "cpp.vec_isa_ok": False,
    "cpp.threads": 1,
    "size_asserts": False,
    "alignment_asserts": False,
    "force_disable_caches": True,  # nothing comes to their end: what is kept is the library
    # Parts that are joined are written where they belong, not selected at every element.
    "max_pointwise_cat_inputs": 0,
    # What may be joined to a loop is looked for among its neighbours: of the models of the zoo the
    # same loops were found as among the 64 that Inductor takes, and of a thousand operations in
    # three fifths of the time.
    "max_fusion_buffer_group_pairwise_attempts": 4,
    # What a step of a recurrence uses twice, Inductor writes out twice, with all that went before,
    # until that is 30 operations: ten steps took minutes so, and take a second.
    "realize_opcount_threshold": 8,
    # Patterns of attention and of other networks' parts take a third of a second to prepare; loops
    # of ten posteriors are as fast without.
    "use_joint_graph_passes": False,
}

_lowering = threading.Lock()


class _Written(Exception):
    """Ends Inductor's work once the source is there."""


def with_constants_as_arguments(graph: GraphModule) -> tuple[GraphModule, list[Tensor]]:
    """The same graph with its constants as further arguments; and these, without gaps in memory.

    So what is compiled depends on the shapes of the data, and not on the data.
    """
    graph = repeated_late(writing_to_copies(graph))
    lifted, known = Graph(), {}
    for node in graph.graph.find_nodes(op="placeholder"):
        known[node] = lifted.placeholder(node.name)
    constants: dict[str, tuple[Node, Tensor]] = {}
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in constants:
            value = graph.get_buffer(name).detach().contiguous()
            constants[name] = lifted.placeholder(f"constant_{len(constants)}"), value
        known[node] = constants[name][0]
    for node in graph.graph.nodes:
        if node.op == "output":
            lifted.output(map_arg(node.args[0], known.__getitem__))
        elif node not in known:
            known[node] = _copied(lifted, node, known)
    return GraphModule({}, lifted), [value for _, value in constants.values()]


def _copied(graph: Graph, node: Node, known: dict[Node, Node]) -> Node:
    """A node in another graph; products and slopes of matrices as the engine's own operations."""
    if node.target in DECOMPOSITIONS:
        made = graph.node_copy(node, known.__getitem__)
        made.target = DECOMPOSITIONS[node.target]
        return made
    if (found := factors.slope_in_factor(node)) is not None:
        adjoint = torch.ops.pyro_hamflow.cholesky_adjoint.default
        return graph.call_function(adjoint, tuple(known[part] for part in found))
    rule = _PRODUCTS.get(node.target)
    if rule is None:
        return graph.node_copy(node, known.__getitem__)
    return rule(
        graph, *map_arg(node.args, known.__getitem__), **map_arg(node.kwargs, known.__getitem__)
    )


# Inductor takes products with a vector apart into sums, and works out the vector at every row.
_own = torch.library.Library("pyro_hamflow", "DEF")
_own.define("product(Tensor a, Tensor b) -> Tensor")
_own.impl("product", lambda a, b: torch.matmul(a, b).contiguous(), "CompositeExplicitAutograd")


_own.define("cholesky_adjoint(Tensor factor, Tensor slope) -> Tensor")
_own.impl("cholesky_adjoint", factors.formula, "CompositeExplicitAutograd")


@torch.library.register_fake("pyro_hamflow::cholesky_adjoint")
def _shape_of_adjoint(factor: Tensor, slope: Tensor) -> Tensor:
    return factor.new_empty(factor.shape)


@torch.library.register_fake("pyro_hamflow::product")
def _shape_of_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def _product(graph: Graph, a: Node, b: Node) -> Node:
    return graph.call_function(torch.ops.pyro_hamflow.product.default, (a, b))


def _times_vector(graph: Graph, a: Node, b: Node) -> Node:
    column = graph.call_function(torch.unsqueeze, (b, -1))
    return graph.call_function(torch.squeeze, (_product(graph, a, column), -1))


def _added(times: Callable[..., Node]) -> Callable[..., Node]:
    """The rule for a product to which something is added."""

    def rule(
        graph: Graph, start: Node, a: Node, b: Node, *, beta: float = 1, alpha: float = 1
    ) -> Node:
        scaled = [
            part if factor == 1 else graph.call_function(torch.mul, (part, factor))
            for part, factor in ((start, beta), (times(graph, a, b), alpha))
        ]
        return graph.call_function(torch.add, tuple(scaled))

    return rule


_aten = torch.ops.aten
_PRODUCTS: dict[Any, Callable[..., Node]] = {
    torch.mm: _product,
    torch.bmm: _product,
    torch.mv: _times_vector,
    _aten.mm.default: _product,
    _aten.bmm.default: _product,
    _aten.mv.default: _times_vector,
    torch.addmm: _added(_product),
    torch.baddbmm: _added(_product),
    torch.addmv: _added(_times_vector),
    _aten.addmm.default: _added(_product),
    _aten.baddbmm.default: _added(_product),
    _aten.addmv.default: _added(_times_vector),
}


def source_of(graph: GraphModule, examples: list[Tensor]) -> ast.Module:
    """What Inductor writes for a graph: a program in Python that calls kernels in C++.

    Arguments:
        graph: The graph.
        examples: Arguments of the shapes it will be called with.

    Raises:
        NotSupported: If Inductor does not know what to do with it.
    """
    with collecting_later():
        import torch._inductor as inductor  # here, for it takes a second to import
        from torch._inductor.graph import GraphLowering  # likewise

    written: list[str] = []

    def keep(source: str) -> None:
        written.append(source)
        raise _Written

    loggers = [logging.getLogger(f"torch._inductor.{name}") for name in ("utils", "graph")]
    levels = [logger.level for logger in loggers]
    known = partial(hasattr, inductor.config)  # by this version of torch
    options = {name: value for name, value in _OPTIONS.items() if known(name.split(".")[0])}
    with _lowering, torch.no_grad(), inductor.config.patch(options):
        try:
            for logger in loggers:  # they take the end for an error
                logger.setLevel(logging.CRITICAL)
            GraphLowering.save_output_code = staticmethod(keep)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of torch's own code
                with writing_before_reading(), costly_kept():
                    inductor.compile(graph, list(examples))
        except Exception as error:  # ours, in a wrapping of Inductor's; or any of its own
            if not written:
                raise NotSupported(_reason(error)) from error
        finally:
            GraphLowering.save_output_code = None
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
    if len(written) != 1:
        raise NotSupported("a graph in several parts")
    return ast.parse(written[0])


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
