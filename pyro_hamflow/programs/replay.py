"""Graphs whose constants are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Interpreter

_aten = torch.ops.aten
# Filling in place: for its shapes torch imports SymPy, which takes a fifth of the import of torch.
_FILLED = {
    _aten.masked_fill_.Scalar: _aten.masked_fill.Scalar,
    _aten.masked_fill_.Tensor: _aten.masked_fill.Tensor,
}


def replay(graph: Graph, constants: Mapping[str, Tensor], *inputs: Tensor) -> Any:
    """Performs a graph's operations.

    A transform of the whole sees constants as arguments then, and what is made of them as its own,
    which may be written to.
    """
    return _Replay(graph, constants).run(*inputs)


class _Replay(Interpreter):
    def __init__(self, graph: Graph, constants: Mapping[str, Tensor]) -> None:
        super().__init__(torch.nn.Module(), graph=graph)
        self._constants = constants

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _FILLED:
            return args[0].copy_(_FILLED[target](*args))
        return super().call_function(target, args, kwargs)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._constants[target]
