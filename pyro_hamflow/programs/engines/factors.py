r"""Slopes in Cholesky factors, which torch takes back by products and solutions of whole matrices.

For :math:`L L^\top` torch's formula is :math:`L^{-\top} \tfrac12 (H + H^\top) L^{-1}`. There
H is :math:`L^\top` times the slope in L, without what lies above the diagonal and with half of what
lies on it. Taking the factorisation back, column by column, takes a sixth of its arithmetic.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node


class _Call(NamedTuple):
    """A call of an operation, of whatever overload; strings among its arguments are any nodes."""

    name: str
    args: tuple[Any, ...]
    settings: dict[str, bool] = {}


_TURNED = _Call("transpose", ("factor", -2, -1))
_LOWER = _Call("tril", (_Call("mm", (_TURNED, "slope")),))
_ABOVE = _Call("transpose", (_Call("tril", (_LOWER, -1)), -2, -1))
_HALF = _Call("mul", (_Call("add", (_LOWER, _ABOVE)), 0.5))
_INNER = _Call("linalg_solve_triangular", (_TURNED, _HALF), {"upper": True})
_FORMULA = _Call("linalg_solve_triangular", ("factor", _INNER), {"upper": False, "left": False})
_FACTOR = _Call("getitem", (_Call("linalg_cholesky_ex", ("matrix",)), 0))
_CHECKED = _Call("masked_fill", (_FACTOR, "failed", "nan"))  # by NaN, where there is no factor


def slope_in_factor(node: Node) -> tuple[Node, Node] | None:
    """The factor and the slope in it, of which a node makes the slope in the matrix; if it does."""
    found: dict[str, Any] = {}
    if not _fits(_FORMULA, node, found):
        return None
    factor, slope = found["factor"], found["slope"]
    if not (_fits(_FACTOR, factor, {}) or _fits(_CHECKED, factor, {})):
        return None  # numbers above its diagonal might be read
    return factor, slope


def _fits(pattern: Any, part: Any, found: dict[str, Any]) -> bool:
    """Whether part of a graph is as a pattern says; keeps what its names stand for."""
    if isinstance(pattern, str):
        return found.setdefault(pattern, part) is part
    if not isinstance(pattern, _Call):
        return bool(pattern == part)
    if not isinstance(part, Node) or part.op != "call_function" or part.kwargs != pattern.settings:
        return False
    if getattr(part.target, "__name__", "").split(".")[0] != pattern.name:
        return False
    pairs = zip(pattern.args, part.args, strict=False)
    return len(pattern.args) == len(part.args) and all(_fits(*pair, found) for pair in pairs)


def formula(factor: Tensor, slope: Tensor) -> Tensor:
    """What is recognised."""
    lower = (factor.mT @ slope).tril()
    half = 0.5 * (lower + lower.tril(-1).mT)
    inner = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return torch.linalg.solve_triangular(factor, inner, upper=False, left=False).contiguous()
