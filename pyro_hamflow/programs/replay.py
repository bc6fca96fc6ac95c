"""Graphs whose constants are arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Interpreter


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

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Tensor:
        return self._constants[target]
