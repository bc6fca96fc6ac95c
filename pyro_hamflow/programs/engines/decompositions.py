"""Operations that neither Inductor nor this engine has loops for, in terms of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def _variance(
    a: Tensor,
    dim: Sequence[int] | None = None,
    *,
    correction: float | None = None,
    keepdim: bool = False,
) -> Tensor:
    dims = list(dim) if dim else list(range(a.dim()))
    count = math.prod(a.shape[i] for i in dims) - (1 if correction is None else correction)
    squares = (a - a.mean(dims, keepdim=True)).square()
    return squares.sum(dims, keepdim=keepdim) / max(count, 0)


def _deviation(a: Tensor, dim: Sequence[int] | None = None, **settings: Any) -> Tensor:
    return _variance(a, dim, **settings).sqrt()


def _variance_and_mean(
    a: Tensor, dim: Sequence[int] | None = None, *, keepdim: bool = False, **settings: Any
) -> tuple[Tensor, Tensor]:
    dims = list(dim) if dim else list(range(a.dim()))
    return _variance(a, dims, keepdim=keepdim, **settings), a.mean(dims, keepdim=keepdim)


def _cholesky_solve(b: Tensor, factor: Tensor, upper: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    lower = factor.mT if upper else factor
    half = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mT, half, upper=True)


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return _cholesky_solve(one.expand_as(factor), factor, upper)


_aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.var.correction: _variance,
    _aten.std.correction: _deviation,
    _aten.var_mean.correction: _variance_and_mean,
    _aten.cholesky_solve.default: _cholesky_solve,
    _aten.cholesky_inverse.default: _cholesky_inverse,
}
