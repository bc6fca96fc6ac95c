"""Missing values (NaN) among the constants of a graph."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule


def without_gaps_in_constants(graph: GraphModule) -> GraphModule:
    """A graph whose constants have numbers in place of NaN: medians of their columns.

    A result that is a number in spite of them does not depend on what is missing, and stays the
    same.
    """
    constants = torch.nn.Module()
    for name, value in graph.named_buffers():
        constants.register_buffer(name, _closed(value) if value.is_floating_point() else value)
    return GraphModule(constants, graph.graph)


def _closed(value: Tensor) -> Tensor:
    if not value.isnan().any():
        return value
    columns = value.nanmedian(0).values if value.dim() else value
    columns = torch.where(columns.isnan(), value.nanmedian(), columns).nan_to_num(1.0)
    return torch.where(value.isnan(), columns, value)
