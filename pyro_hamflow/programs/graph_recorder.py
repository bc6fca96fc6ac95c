"""Writes down the tensor operations that a function performs, as a graph.

``make_fx`` does so too, but keeps a stack trace, a proxy and a fake tensor for every operation: on
models of thousands of operations it takes ten times as long, which is many seconds.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_aggregate, map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from pyro_hamflow.programs.functions import InOtherWords
from pyro_hamflow.programs.recording import Recording
from pyro_hamflow.programs.triangular import linalg_solve_triangular
from pyro_hamflow.programs.values import ValueDependence, ValueGuard
from pyro_hamflow.programs.watching import as_written, watching

Rule = Callable[..., Any]

_aten = torch.ops.aten
CHECK_ERRORS = _aten._linalg_check_errors.default


@watching
class Recorder(TorchDispatchMode):
    """Writes down operations as they come, those that write to their arguments included.

    Tensors that a function gets from elsewhere become constants of its graph. It records once.

    Arguments:
        rules: Functions to run in place of operations; where one returns ``NotImplemented``, the
            operation itself runs.
        live: Whether gradients are to flow through the graph: into its constants, and not where
            the function has stopped them.

    Attributes:
        takes_parts: Whether a recording that the function calls is one operation.
        fallible: What the function calls that can fail at some values of its arguments: names by
            the number of the check. The graph does not fail: its results there are NaN.
    """

    def __init__(self, rules: Mapping[Any, Rule] | None = None, *, live: bool = False) -> None:
        super().__init__()
        self.graph = Graph()
        self.rules = rules or {}
        self.live = live
        self.takes_parts = not live
        self.fallible: dict[int, str] = {}
        self._constants = torch.nn.Module()
        self._nodes = WeakTensorKeyDictionary()
        self._varying: set[Node] = set()
        self._written: dict[int, Any] = {}
        self._expanding: list[Any] = []
        self._checks = itertools.count()
        self._graded = False

    def record(self, function: Callable[..., Any], *examples: Tensor) -> Any:
        """Runs a function of tensors; returns its result.

        Raises:
            RuntimeError: If Python asks for the value of a tensor that depends on the arguments, or
                the shape of a tensor depends on such values.
        """
        self._graded = torch.is_grad_enabled()
        for index, example in enumerate(examples):
            node = self.graph.placeholder(f"argument_{index}")
            self._varying.add(node)
            self._note(example, node)
        with as_written(), InOtherWords(), ValueGuard(self._varies), self:
            result = function(*examples)
        self.graph.output(tree_map(self._node_of, result))
        return result

    def constants(self) -> dict[str, Tensor]:
        """The tensors that the function has got from elsewhere."""
        return dict(self._constants.named_buffers())

    def module(self) -> Recording:
        """The graph as a module, without operations whose results nobody uses."""
        self.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        for node in self.graph.nodes:
            node.target = _CALLED.get(node.target, node.target)
        return Recording(self._constants, self.graph)

    def __torch_dispatch__(
        self, target: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        arguments = (args, kwargs or {})
        inputs = map_aggregate(arguments, self._node_of)
        varies = is_random(target) or self._any_varies(arguments, inputs)
        if target is CHECK_ERRORS:
            number = next(self._checks)
            if varies:
                return self._let_fail(inputs[0], number, args[1])
        if varies and torch.Tag.data_dependent_output in target.tags:
            raise ValueDependence(str(target))
        if varies and self._has_varying_shape(target, args):
            raise RuntimeError(
                f"{target} makes a tensor whose shape depends on the values of the program's "
                "arguments, as `x[x > 0]` does for a latent variable `x`"
            )
        if torch.Tag.data_dependent_output in target.tags:
            return target(*args, **arguments[1])
        return self._perform(target, arguments, inputs, varies=varies)

    def _perform(self, target: Any, arguments: Any, inputs: Any, *, varies: bool) -> Any:
        """Runs an operation and writes it down.

        Arguments:
            target: The operation.
            arguments: Its positional and its keyword arguments.
            inputs: The same with nodes in place of tensors.
            varies: Whether its result depends on the program's arguments, or is random.
        """
        args, kwargs = arguments
        if varies and (result := self._by_rule(target, arguments)) is not NotImplemented:
            return result
        if target is _aten.lift_fresh.default:
            # A literal, which may be written to: in each run to a copy of its own.
            target = _aten.lift_fresh_copy.default
        if varies and target._schema.is_mutable:
            # What is written to a tensor shows in all that share its memory.
            for tensor in _written(target, *arguments):
                storage = tensor.untyped_storage()
                self._written[storage._cdata] = storage
        result = target(*args, **kwargs)
        self._note(result, self._call(target, *inputs, varies=varies))
        return result

    def _has_varying_shape(self, target: Any, args: Any) -> bool:
        """Whether the shape of an operation's result depends on values that vary."""
        if target is _aten.index.Tensor:
            return any(
                index is not None and index.dtype == torch.bool and self._varies(index)
                for index in args[1]
            )
        if target is _aten.masked_select.default:
            return self._varies(args[1])
        if target is _aten.linalg_lstsq.default:  # its residuals alone, by the matrix's rank
            return False
        return torch.Tag.dynamic_output_shape in target.tags

    def _by_rule(self, target: Any, arguments: Any) -> Any:
        """Runs an operation's rule in its place; in the rule, the operation means itself."""
        if target not in self.rules or target in self._expanding:
            return NotImplemented
        self._expanding.append(target)
        try:
            with self:
                return self.rules[target](*arguments[0], **arguments[1])
        finally:
            self._expanding.remove(target)

    def _let_fail(self, args: Any, number: int, name: str) -> None:
        """Leaves out the check that a factorisation has worked, and makes its failures NaN."""
        factors = args[0].args[0] if args[0].target is operator.getitem else None
        if factors is None or not str(factors.target).removesuffix(".default").endswith("_ex"):
            raise ValueDependence(f"the check of {name}")
        self.fallible[number] = name
        factors.target = nan_where_failed(factors.target)

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
            self._constants.register_buffer(name, value if self.live else value.detach())
            node = self.graph.get_attr(name)
            self._nodes[value] = node
            node.meta["kind"] = kind_of(value)
            if self.live and value.requires_grad:
                self._varying.add(node)
        return node

    def _note(self, result: Any, node: Node) -> None:
        """Remembers which tensors are a node's results, and of which kind."""
        varies = node in self._varying
        if isinstance(result, Tensor):
            if self.live and self._graded and varies and not torch.is_grad_enabled():
                node = self._call(_aten.detach.default, (node,), {}, varies=True)
            node.meta["kind"] = kind_of(result)
            self._nodes[result] = node
        elif isinstance(result, (tuple, list)):
            for index, part in enumerate(result):
                self._note(part, self._call(operator.getitem, (node, index), {}, varies=varies))

    def _varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the arguments."""
        written = bool(self._written) and tensor.untyped_storage()._cdata in self._written
        return written or self._nodes.get(tensor) in self._varying

    def _any_varies(self, arguments: Any, inputs: Any) -> bool:
        nodes: list[Node] = []
        map_arg(inputs, nodes.append)
        if not self._varying.isdisjoint(nodes):
            return True
        return bool(self._written) and any(map(self._varies, _tensors(arguments)))


@cache
def nan_where_failed(factorise: Callable[..., Any]) -> Callable[..., Any]:
    """A factorisation whose results are NaN where the last of them says that it has failed.

    It is the same function each time, so that alike operations are seen to be alike.
    """

    def run(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        *results, info = factorise(*args, **kwargs)
        failed = info != 0
        return *(nan_where(result, failed) for result in results), info

    return run


def nan_where(result: Tensor, failed: Tensor) -> Tensor:
    """A result with NaN in each of a batch that has failed; of no effect on whole numbers."""
    if not (result.is_floating_point() or result.is_complex()):
        return result
    mask = failed.reshape(failed.shape + (1,) * (result.dim() - failed.dim()))
    return result.masked_fill(mask, torch.nan)


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
# Functions that stand in graphs for operations, which may be derived and batched again.
_CALLED = _BINDINGS | {_aten.linalg_solve_triangular.default: linalg_solve_triangular}


def is_random(target: Any) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(target, "tags", ())


def _written(target: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The arguments that an operation writes to."""
    written: list[Tensor] = []
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            written += _tensors(value)
    return written


def _tensors(nested: Any) -> list[Tensor]:
    found: list[Tensor] = []
    map_aggregate(nested, lambda value: found.append(value) if isinstance(value, Tensor) else None)
    return found


def kind_of(tensor: Tensor) -> tuple[Any, ...]:
    """A tensor's shape, type and device."""
    return tensor.shape, tensor.dtype, tensor.device
