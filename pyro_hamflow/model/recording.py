"""Writes down the tensor operations that a function performs, as a graph.

``make_fx`` does so too, but keeps a stack trace, a proxy and a fake tensor for every operation: on
models of thousands of operations it takes ten times as long, which is many seconds.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

Rule = Callable[..., Any]

_aten = torch.ops.aten


class Recorder(TorchDispatchMode):
    """Writes down operations as they come, those that write to their arguments included.

    Tensors that a function gets from elsewhere become constants of its graph. It records once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = Graph()
        self._constants = torch.nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        self._varying: set[Node] = set()
        self._all_may_vary = False

    def record(self, function: Callable[..., Any], *examples: Tensor) -> None:
        """Runs a function of tensors.

        Raises:
            RuntimeError: If Python asks for the value of a tensor that depends on the arguments.
        """
        for index, example in enumerate(examples):
            node = self.graph.placeholder(f"argument_{index}")
            self._varying.add(node)
            self._note(example, node)
        # What a model compiles for itself would hide its operations.
        with torch.compiler.set_stance("force_eager"), self:
            result = function(*examples)
        self.graph.output(tree_map(self._node_of, result))

    def replay(self, *inputs: Tensor) -> Any:
        """Performs the same operations on other arguments."""
        return Interpreter(self._constants, graph=self.graph).run(*inputs)

    def module(self) -> GraphModule:
        """The graph as a module, without operations whose results nobody uses."""
        self.graph.eliminate_dead_code()
        for node in self.graph.nodes:
            node.target = _BINDINGS.get(node.target, node.target)
        return GraphModule(self._constants, self.graph)

    def __torch_dispatch__(
        self, target: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = (args, kwargs or {})
        inputs = map_aggregate(arguments, self._node_of)
        varies = self._all_may_vary or _is_random(target) or self._any_varies(inputs)
        if torch.Tag.data_dependent_output not in target.tags:
            return self._perform(target, arguments, inputs, varies=varies)
        if varies:
            raise RuntimeError(
                f"{target} asks for the value of a tensor that depends on the program's arguments, "
                "as control flow that follows latent variables does"
            )
        return target(*args, **arguments[1])

    def _perform(self, target: Any, arguments: Any, inputs: Any, *, varies: bool) -> Any:
        """Runs an operation and writes it down.

        Arguments:
            target: The operation.
            arguments: Its positional and its keyword arguments.
            inputs: The same with nodes in place of tensors.
            varies: Whether its result depends on the program's arguments, or is random.
        """
        if target is _aten.lift_fresh.default:
            # A literal, which may be written to: in each run to a copy of its own.
            target = _aten.lift_fresh_copy.default
        # What is written to a tensor shows in all that share its memory.
        self._all_may_vary |= varies and target._schema.is_mutable
        result = target(*arguments[0], **arguments[1])
        self._note(result, self._call(target, *inputs, varies=varies))
        return result

    def _call(self, target: Any, args: Any, kwargs: Any, *, varies: bool) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        if varies:
            self._varying.add(node)
        return node

    def _node_of(self, value: Any) -> Any:
        """The node whose result is a tensor; other values as they are."""
        if not isinstance(value, Tensor):
            return value
        node = self._nodes.get(value)
        if node is None:
            name = f"constant_{len(self._constants._buffers)}"
            self._constants.register_buffer(name, value.detach())
            node = self.graph.get_attr(name)
            self._note(value, node)
        return node

    def _note(self, result: Any, node: Node) -> None:
        """Remembers which tensors are a node's results, and of which kind."""
        if isinstance(result, Tensor):
            node.meta["kind"] = _kind(result)
            self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                varies = node in self._varying
                self._note(part, self._call(operator.getitem, (node, index), {}, varies=varies))

    def _any_varies(self, inputs: Any) -> bool:
        nodes: list[Node] = []
        map_arg(inputs, nodes.append)
        return not self._varying.isdisjoint(nodes)


class PureRecorder(Recorder):
    """Writes down operations that do not write, and simplifies as it goes.

    What depends on no argument is computed once, now; what is repeated or does nothing is left out.

    Arguments:
        rules: Functions to run in place of operations; where one returns ``NotImplemented``, the
            operation itself runs.
    """

    def __init__(self, rules: Mapping[Any, Rule] | None = None) -> None:
        super().__init__()
        self.rules = rules or {}
        self._calls: dict[str, Node] = {}

    def _perform(self, target: Any, arguments: Any, inputs: Any, *, varies: bool) -> Any:
        args, kwargs = arguments
        if not varies:
            return target(*args, **kwargs)
        if target in self.rules:
            with self:
                result = self.rules[target](*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = target(*args, **kwargs)
        source = _returned(target, inputs[0])
        if source is not None and source.meta["kind"] == _kind(result):
            self._nodes[result] = source
            return result
        if target in _VIEWS:  # the source may have lost the clone that it relies on
            target = _aten.reshape.default
        if (factors := _product_of_transposes(target, inputs[0])) is not None:
            turned = self._call(_TRANSPOSE, (factors[0], [1, 0]), {}, varies=True)
            node = self._call(_PRODUCT, (factors[1], turned), {}, varies=True)
        else:
            node = self._call(target, *inputs, varies=True)
        self._note(result, node)
        return result

    def _call(self, target: Any, args: Any, kwargs: Any, *, varies: bool) -> Node:
        if _is_random(target):
            return super()._call(target, args, kwargs, varies=varies)
        key = repr((target, args, kwargs))
        if key not in self._calls:
            self._calls[key] = super()._call(target, args, kwargs, varies=varies)
        return self._calls[key]


_COPIES = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.lift_fresh_copy.default,
}
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_SHAPES = {*_VIEWS, _aten.reshape.default, _aten.expand.default}
_PRODUCT, _TRANSPOSE = _aten.mm.default, _aten.permute.default


# Python's own functions for what is called most: they take half the time to call.
_BINDINGS = {
    getattr(getattr(_aten, name), overload): getattr(torch, name)
    for name, overload in (
        pair.split(".")
        for pair in """
            abs.default add.Tensor bitwise_and.Tensor bitwise_not.default bmm.default cat.default
            clamp.default clamp_min.default cumprod.default cumsum.default div.Tensor eq.Scalar
            exp.default flip.default full_like.default gather.default ge.Scalar ge.Tensor gt.Scalar
            gt.Tensor le.Scalar le.Tensor lgamma.default log.default log1p.default
            logical_and.default logsumexp.default lt.Scalar lt.Tensor masked_fill.Scalar mm.default
            mul.Scalar mul.Tensor neg.default permute.default pow.Tensor_Scalar pow.Tensor_Tensor
            reshape.default rsqrt.default rsub.Scalar select.int sigmoid.default
            split_with_sizes.default sqrt.default stack.default sub.Tensor sum.dim_IntList
            squeeze.dims tanh.default transpose.int unsqueeze.default where.self
        """.split()
    )
}


def _returned(target: Any, args: Any) -> Node | None:
    """The argument that an operation returns as it is, if its result is of the same kind."""
    if target in _COPIES or target in _SHAPES:
        return args[0]
    if target == _TRANSPOSE:
        return args[0] if list(args[1]) == sorted(args[1]) else None
    return args[1] if target == _aten.copy.default else None


def _product_of_transposes(target: Any, args: Any) -> tuple[Node, Node] | None:
    """A and B, if an operation makes the transpose of A times the transpose of B.

    Batches of a matrix times a vector come so. As B times the transpose of A, each of a batch has a
    row of its own, over which later operations run faster.
    """
    if not _is_transpose(target, args) or args[0].target != _PRODUCT:
        return None
    left, right = args[0].args
    return (left, right.args[0]) if _is_transpose(right.target, right.args) else None


def _is_transpose(target: Any, args: Any) -> bool:
    return target == _TRANSPOSE and list(args[1]) == [1, 0]


def _is_random(target: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.dtype, tensor.device
