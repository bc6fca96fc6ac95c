"""Captured programs, and how they become parts of larger ones."""

from __future__ import annotations

from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves


class Recording(GraphModule):
    """A captured program.

    Called by a function that is captured in turn, it is one operation there, :data:`PART`, and its
    own are copied in the end: to run and write them down once more takes as long as at first.
    """

    def __call__(self, *inputs: Any) -> Any:
        takes_parts = getattr(_get_current_dispatch_mode(), "takes_parts", False)  # a recorder
        if not takes_parts or any(map(_is_wrapped, inputs)):
            return super().__call__(*inputs)
        _recordings[id(self)] = self
        results = iter(PART(id(self), list(inputs)))
        return map_arg(self.returned, lambda _: next(results))

    @property
    def returned(self) -> Any:
        """What it returns, with nodes in place of tensors."""
        return self.graph.output_node().args[0]

    @property
    def ends(self) -> list[Node]:
        """The nodes of the tensors that it returns, one after the other."""
        found: list[Node] = []
        map_arg(self.returned, found.append)
        return found


def recording_of(number: int) -> Recording:
    """The recording that a part is."""
    return _recordings[number]


def _is_wrapped(value: Tensor) -> bool:
    """Whether somebody derives by a tensor, or has it stand for a batch."""
    return value.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(value)


def _run(number: int, inputs: list[Tensor]) -> list[Tensor]:
    """Runs a recording; returns the tensors among its results, one after the other."""
    with torch._C.DisableTorchFunction():
        results = recording_of(number)(*inputs)
    return [result for result in tree_leaves(results) if isinstance(result, Tensor)]


_recordings: WeakValueDictionary[int, Recording] = WeakValueDictionary()
_LIBRARY = torch.library.Library("pyro_hamflow", "FRAGMENT")
_LIBRARY.define("part(int number, Tensor[] inputs) -> Tensor[]")
_LIBRARY.impl("part", _run, "CompositeExplicitAutograd")
PART = torch.ops.pyro_hamflow.part.default
