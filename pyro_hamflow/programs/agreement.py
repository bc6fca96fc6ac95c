"""Whether a graph and the function that it was captured from agree, but for rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

# Relative to a tensor's largest number: sums in another order differ by 1e-9 in double precision.
_ROUNDING = {torch.float64: 1e-8, torch.float32: 1e-3}


def tolerance_of(graph: GraphModule) -> float:
    """How near to each other results are that differ by rounding, in the coarsest of its types."""
    kinds = {node.meta["kind"][1] for node in graph.graph.nodes if "kind" in node.meta}
    return 1e-11 if {k for k in kinds if k.is_floating_point} <= {torch.float64} else 1e-3


def coarsest_of(graph: GraphModule, kind: torch.dtype) -> torch.dtype:
    """Of the types that a graph works in, and this one, that of the fewest digits."""
    kinds = {
        n.meta["kind"][1] for n in graph.graph.nodes if n.op.startswith("call") and "kind" in n.meta
    }
    known = [k for k in kinds if k in _ROUNDING]
    return max([kind, *known], key=lambda k: torch.finfo(k).eps)


def all_equal(first: Sequence[Tensor], second: Sequence[Tensor], tolerance: float) -> bool:
    """Whether results are as near to each other as that, gaps included."""
    return all(
        torch.allclose(one, other, rtol=tolerance, atol=tolerance, equal_nan=True)
        for one, other in zip(first, second, strict=True)
    )


def same_but_for_order(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether results are the same but for the order of sums.

    Where one that is expected is not finite, nothing is told by others beside it that are not.
    """
    is_finite = all(bool(other.isfinite().all()) for other in expected)
    tolerance = rounding_of(expected)
    for one, other in zip(found, expected, strict=True):
        seen = one.isfinite() & other.isfinite()
        if (is_finite and not seen.all()) or not is_near(one[seen], other[seen], tolerance):
            return False
    return True


def rounding_of(results: Sequence[Tensor]) -> float:
    """By how much results may differ, relative to the largest: in the coarsest of their types."""
    return max(_ROUNDING.get(result.dtype, 0.0) for result in results)


def is_near(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Whether two tensors are the same but for rounding, gaps included."""
    if not other.is_floating_point() or not other.numel():
        return torch.equal(one, other)
    finite = other.abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = tolerance * (1.0 + float(finite.max()))
    return torch.allclose(one, other, rtol=tolerance, atol=scale, equal_nan=True)
