"""Functions of numbers that are the same for all data: worked out once, and then repeated.

Distributions repeat their parameters for all data before they work with them: the logarithm of the
gamma function of one parameter would be worked out for each datum.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

# What works on each number by itself, by the names that torch has for it.
_ONE_BY_ONE = frozenset(
    "add sub rsub mul div true_divide neg abs exp expm1 log log1p log2 sqrt rsqrt square "
    "reciprocal pow sin cos tanh sigmoid lgamma digamma polygamma erf erfc erfinv mvlgamma "
    "softplus log_sigmoid logaddexp atan asin acos sinh cosh ones_like zeros_like full_like".split()
)
# What Inductor works out anew wherever it is read, though it takes longer than all around it.
_COSTLY = frozenset("lgamma digamma polygamma erfinv igamma igammac zeta i0 i1".split())


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "").split(".")[0]


def repeated_late(graph: GraphModule) -> GraphModule:
    """The same graph, in which numbers are repeated after what works on each by itself."""
    if not any(_name(node) == "expand" for node in graph.graph.nodes):
        return graph
    made, known = Graph(), dict[Node, Node]()
    few = dict[Node, Node]()  # of what is repeated, what it is made of
    for node in graph.graph.nodes:
        known[node] = made.node_copy(node, known.__getitem__)
        source = _source(node, few)
        if source is not None:
            few[node] = few.get(source, known[source])
        elif _is_narrow(node, few):
            small = made.node_copy(node, few.__getitem__)
            small.meta["kind"] = (torch.Size(), *node.meta["kind"][1:])
            whole = made.call_function(torch.Tensor.expand, (small, *_shape(node)))
            known[node] = made.call_function(
                torch.clone, (whole,), {"memory_format": torch.contiguous_format}
            )
            known[node].meta.update(node.meta)
            few[node] = small
    made.eliminate_dead_code()
    return GraphModule(graph, made)


def _source(node: Node, few: dict[Node, Node]) -> Node | None:
    """What a node repeats, if it repeats one number."""
    if _name(node) != "expand" or not isinstance(node.args[0], Node):
        return None
    first: Node = node.args[0]
    if first in few:
        return first
    is_one = "kind" in first.meta and len(_shape(first)) == 0
    return first if is_one and "kind" in node.meta and _shape(node).numel() > 1 else None


def _is_narrow(node: Node, few: dict[Node, Node]) -> bool:
    """Whether it works on repeated numbers alone, of one type, each by itself."""
    inputs = node.all_input_nodes
    if _name(node) not in _ONE_BY_ONE or "kind" not in node.meta or not inputs:
        return False
    if not all(part in few and "kind" in part.meta for part in inputs):
        return False
    kinds = {part.meta["kind"][1] for part in [node, *inputs]}
    return len(kinds) == 1 and all(kind.is_floating_point for kind in kinds)


def _shape(node: Node) -> torch.Size:
    shape: torch.Size = node.meta["kind"][0]
    return shape


@contextmanager
def costly_kept() -> Iterator[None]:
    """Has Inductor keep what is costly where it is repeated, in place of working it out anew."""
    from torch._inductor.ir import Pointwise, StorageBox  # here, for it takes a second to import

    box: Any = StorageBox
    is_kept = box.should_realize_on_reuse

    def is_kept_or_costly(self: Any, users: int, **keywords: Any) -> bool:
        if is_kept(self, users, **keywords):
            return True
        if users <= 1 or not isinstance(self.data, Pointwise):
            return False
        return not _COSTLY.isdisjoint(self.data.inner_fn_opcount().used_ops)

    box.should_realize_on_reuse = is_kept_or_costly
    try:
        yield
    finally:
        box.should_realize_on_reuse = is_kept
