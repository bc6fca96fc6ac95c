"""Triangular systems, so that many right sides of one matrix stay one system.

Under ``vmap`` torch copies a matrix for each of the right sides that it batches. The derivative in
the matrix is then a sum of as many outer products, each made whole: a gradient of a Gaussian
process' estimate at a hundred places, whose Hessian is taken direction by direction, took three
times as long for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack
from torch.fx import Proxy
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_SOLVE = torch.ops.aten.linalg_solve_triangular.default


def linalg_solve_triangular(
    triangle: Tensor,
    right: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Tensor:
    """What :func:`torch.linalg.solve_triangular` gives; its arguments are explained there."""
    if not knows_rules(triangle, right):
        return _SOLVE(triangle, right, upper=upper, left=left, unitriangular=unitriangular)
    if left:
        return Solution.apply(triangle, right, upper, unitriangular)
    return Solution.apply(triangle.mT, right.mT, not upper, unitriangular).mT  # of the transposes


def cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    """What :func:`torch.cholesky_solve` gives, by two systems."""
    lower = factor.mT if upper else factor
    half = linalg_solve_triangular(lower, right, upper=False)
    return linalg_solve_triangular(lower.mT, half, upper=True)


def knows_rules(*operands: Any) -> bool:
    """Whether something derives or batches an operation, which goes by a function's own rules.

    Where a graph is unpickled it is only traced; and a recorder that keeps gradients takes those of
    a function with a rule of its own for stopped.
    """
    if any(isinstance(operand, Proxy) for operand in operands):
        return False
    if any(getattr(mode, "live", False) for mode in _get_current_dispatch_mode_stack()):
        return False
    transforms = {level.key() for level in get_interpreter_stack() or []}
    if transforms:
        return TransformType.Functionalize not in transforms
    return torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)


class Solution(torch.autograd.Function):
    """The solution, for which ``vmap`` puts right sides of one matrix beside each other."""

    @staticmethod
    def forward(triangle: Tensor, right: Tensor, upper: bool, unitriangular: bool) -> Tensor:  # noqa: FBT001
        return _SOLVE(triangle, right, upper=upper, unitriangular=unitriangular)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        triangle, right, *ctx.settings = inputs
        ctx.shape = right.shape
        ctx.save_for_backward(triangle, output)
        ctx.save_for_forward(triangle, output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Any:
        triangle, solution = ctx.saved_tensors
        upper, unitriangular = ctx.settings
        in_right = Solution.apply(triangle.mT, slope, not upper, unitriangular)
        in_triangle = None
        if ctx.needs_input_grad[0]:
            product = _triangle_of(-in_right @ solution.mT, upper, unitriangular)
            in_triangle = product.sum_to_size(triangle.shape)
        return in_triangle, in_right.sum_to_size(ctx.shape), None, None

    @staticmethod
    def jvp(ctx: Any, of_triangle: Tensor, of_right: Tensor, *_: None) -> Tensor:
        triangle, solution = ctx.saved_tensors
        upper, unitriangular = ctx.settings
        moved = of_right - _triangle_of(of_triangle, upper, unitriangular) @ solution
        return Solution.apply(triangle, moved, upper, unitriangular)

    @staticmethod
    def vmap(
        info: Any,
        dims: Any,
        triangle: Tensor,
        right: Tensor,
        upper: bool,  # noqa: FBT001
        unitriangular: bool,  # noqa: FBT001
    ) -> tuple[Tensor, int]:
        if dims[0] is None:
            columns = right.movedim(dims[1], -1)
            solved = Solution.apply(triangle, columns.flatten(-2), upper, unitriangular)
            return solved.unflatten(-1, columns.shape[-2:]), -1
        most = max(triangle.dim() - 1, right.dim() - (dims[1] is not None))
        pairs = zip((triangle, right), dims[:2], strict=True)
        parts = [_batch_first(part, dim, most) for part, dim in pairs]
        return Solution.apply(*parts, upper, unitriangular), 0


def _batch_first(part: Tensor, dim: int | None, most: int) -> Tensor:
    """A batch of tensors of so many dimensions, the batch first; or one for all of a batch."""
    if dim is None:
        return part
    first = part.movedim(dim, 0)
    return first.reshape(len(first), *[1] * (most + 1 - first.dim()), *first.shape[1:])


def _triangle_of(matrix: Tensor, upper: bool, unitriangular: bool) -> Tensor:  # noqa: FBT001
    """The part of a matrix that a triangular one has of it."""
    away = int(unitriangular)
    return matrix.triu(away) if upper else matrix.tril(-away)
