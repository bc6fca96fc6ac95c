"""Writes down the operations of a program that writes to nothing, and simplifies as it goes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.fx.node import map_arg

from pyro_hamflow.programs.graph_recorder import Recorder, Rule, is_random, kind_of
from pyro_hamflow.programs.recording import PART, Recording, recording_of

_aten = torch.ops.aten
_COPIES = {
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.lift_fresh_copy.default,
}
_VIEWS = {_aten.view.default, _aten._unsafe_view.default}
_SHAPES = {*_VIEWS, _aten.reshape.default, _aten.expand.default}
_COPY = _aten.copy.default
_PRODUCT, _TRANSPOSE = _aten.mm.default, _aten.permute.default
_TIMES = _aten.mul.Tensor
_MANY = 1024  # numbers, whose products with others take longer to write down than to add up


class PureRecorder(Recorder):
    """Writes down operations that do not write, and simplifies as it goes.

    What depends on no argument is computed once, now; what is repeated or does nothing is left out.

    Arguments:
        rules: As of :class:`~pyro_hamflow.programs.graph_recorder.Recorder`.
        live: Likewise.
        flat: Whether operations of parts are copied; otherwise parts stay calls.
    """

    def __init__(
        self, rules: Mapping[Any, Rule] | None = None, *, live: bool = False, flat: bool = True
    ) -> None:
        super().__init__(rules, live=live)
        self.flat = flat
        self._calls: dict[str, Node] = {}

    def _perform(self, target: OpOverload, arguments: Any, inputs: Any, *, varies: bool) -> Any:
        args, kwargs = arguments
        if not varies:
            return target(*args, **kwargs)
        if target is PART:
            part, results = recording_of(args[0]), target(*args)
            ends = (self._copy if self.flat else self._keep)(part, inputs[0][1])
            self._nodes.update(zip(results, ends, strict=True))
            return results
        if (result := self._by_rule(target, arguments)) is not NotImplemented:
            return result
        # The functional copy takes its source's place in memory, but views go by the target's.
        result = args[0].clone().copy_(args[1]) if target is _COPY else target(*args, **kwargs)
        source = _returned(target, inputs[0])
        if source is not None and self.live and target is _aten.detach.default:
            source = None
        if source is not None and source.meta["kind"] == kind_of(result):
            self._nodes[result] = source
            return result
        if target in _VIEWS:  # the source may have lost the clone that it relies on
            target = _aten.reshape.default
        if (factors := _product_of_transposes(target, inputs[0])) is not None:
            turned = self._call(_TRANSPOSE, (factors[0], [1, 0]), {}, varies=True)
            node = self._call(_PRODUCT, (factors[1], turned), {}, varies=True)
        elif (summed := _summed_product(target, *inputs)) is not None:
            matrix, vector, over_rows = summed
            if over_rows:
                matrix = self._call(_TRANSPOSE, (matrix, [1, 0]), {}, varies=True)
            flat = self._call(_aten.reshape.default, (vector, [-1]), {}, varies=True)
            product = self._call(_aten.mv.default, (matrix, flat), {}, varies=True)
            node = self._call(_aten.reshape.default, (product, list(result.shape)), {}, varies=True)
        else:
            node = self._call(target, *inputs, varies=True)
        self._note(result, node)
        return result

    def _copy(self, part: Recording, arguments: list[Node]) -> list[Node]:
        """Copies the operations of a part; returns where its results come from."""
        known = dict(zip(part.graph.find_nodes(op="placeholder"), arguments, strict=True))
        for node in part.graph.nodes:
            if node.op == "get_attr":
                known[node] = self._node_of(part.get_buffer(node.target))
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = self._call(node.target, args, kwargs, varies=True)
                known[node].meta.update(node.meta)
        return [known[node] for node in part.ends]

    def _keep(self, part: Recording, arguments: list[Node]) -> list[Node]:
        """Calls a part as it is; returns where its results come from."""
        if not isinstance(part.returned, tuple) or part.returned != tuple(part.ends):
            return self._copy(part, arguments)

        def run(*inputs: Tensor) -> Any:
            return part(*inputs)

        results = self.graph.call_function(run, tuple(arguments))
        ends = [
            self._call(operator.getitem, (results, i), {}, varies=True)
            for i in range(len(part.ends))
        ]
        for copy, end in zip(ends, part.ends, strict=True):
            copy.meta.update(end.meta)
        return ends

    def _call(self, target: Any, args: Any, kwargs: Any, *, varies: bool) -> Node:
        if is_random(target):
            return super()._call(target, args, kwargs, varies=varies)
        key = repr((target, args, kwargs))
        if key not in self._calls:
            self._calls[key] = super()._call(target, args, kwargs, varies=varies)
        return self._calls[key]


def _returned(target: OpOverload, args: Any) -> Node | None:
    """The argument that an operation returns as it is, if its result is of the same kind."""
    if target in _COPIES or target in _SHAPES:
        return args[0]
    if target == _TRANSPOSE:
        return args[0] if list(args[1]) == sorted(args[1]) else None
    return args[1] if target == _COPY else None


def _product_of_transposes(target: OpOverload, args: Any) -> tuple[Node, Node] | None:
    """A and B, if an operation makes the transpose of A times the transpose of B.

    Batches of a matrix times a vector come so. As B times the transpose of A, each of a batch has a
    row of its own, over which later operations run faster.
    """
    if not _is_transpose(target, args) or args[0].target != _PRODUCT:
        return None
    left, right = args[0].args
    return (left, right.args[0]) if _is_transpose(right.target, right.args) else None


def _is_transpose(target: OpOverload, args: Any) -> bool:
    return target == _TRANSPOSE and list(args[1]) == [1, 0]


def _summed_product(target: OpOverload, args: Any, kwargs: Any) -> tuple[Node, Node, bool] | None:
    """A matrix and a vector whose product is what an operation adds up; whether over rows.

    Linear predictors are often written so, and gradients of what they are of.
    """
    if target is not _aten.sum.dim_IntList or kwargs or not args[1] or len(args[1]) != 1:
        return None
    if args[0].target is not _TIMES:
        return None
    kind = args[0].meta["kind"]
    if len(kind[0]) != 2 or kind[0].numel() < _MANY or not kind[1].is_floating_point:
        return None
    over_rows = args[1][0] % 2 == 0
    wanted = [kind[0][0], 1] if over_rows else [1, kind[0][1]]
    left, right = map(_not_repeated, args[0].args)
    for matrix, vector in ((left, right), (right, left)):
        if matrix is None or vector is None:
            continue
        shape, *others = vector.meta["kind"]
        aligned = [1] * (2 - len(shape)) + list(shape)
        if matrix.meta["kind"] == kind and tuple(others) == kind[1:] and aligned == wanted:
            return matrix, vector, over_rows
    return None


def _not_repeated(factor: Any) -> Node | None:
    """A factor, or what it repeats; none where it is a number."""
    if isinstance(factor, Node) and factor.target is _aten.expand.default:
        factor = factor.args[0]
    return factor if isinstance(factor, Node) and "kind" in factor.meta else None
