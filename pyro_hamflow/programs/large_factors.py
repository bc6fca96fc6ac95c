r"""Slopes in Cholesky factors of large matrices, taken back block by block.

For the slope in a matrix torch takes a product and two solutions of whole matrices, twelve times
the arithmetic of the factor itself. With the matrix in four blocks,

.. math:: \begin{pmatrix} L_1 & \\ B & L_2 \end{pmatrix}, \quad
    B = A_{21} L_1^{-\top}, \quad L_2 L_2^\top = A_{22} - B B^\top,

the lower right factor is taken back first, then B, then the upper left one: that is two and a half
times the factor's arithmetic, nearly all of it products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.triangular import knows_rules, linalg_solve_triangular

# Rows of a block, which torch's formula takes back. The slope in a factor of 1,000 rows takes .035
# seconds in place of .12, and the factor itself .012. Below two blocks it gains little.
BLOCK = 256


def cholesky(matrix: Tensor, **settings: Any) -> Tensor:
    """What :func:`torch.linalg.cholesky` gives; other arguments are left to it."""
    if settings or matrix.shape[-1] < 2 * BLOCK or not knows_rules(matrix):
        return NotImplemented
    return Factor.apply(matrix)


class Factor(torch.autograd.Function):
    """The lower factor of symmetric matrices."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor) -> Tensor:
        return torch.linalg.cholesky(matrix)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        return slope_in_matrix(factor, slope)

    @staticmethod
    def jvp(ctx: Any, change: Tensor) -> Tensor:
        (factor,) = ctx.saved_tensors
        half = linalg_solve_triangular(factor, change, upper=False)
        whole = linalg_solve_triangular(factor, half.mT, upper=False)
        return factor @ (whole.tril() - 0.5 * _diagonal_of(whole))


def slope_in_matrix(factor: Tensor, slope: Tensor) -> Tensor:
    """From the slope in a lower factor, ``(*, n, n)``, to the symmetric one in the matrix."""
    n = factor.shape[-1]
    if n <= BLOCK:
        lower = (factor.mT @ slope).tril()
        half = 0.5 * (lower + lower.tril(-1).mT)
        inner = linalg_solve_triangular(factor.mT, half, upper=True)
        return linalg_solve_triangular(factor.mT, inner.mT, upper=True).mT
    at = n // 2
    below, own = factor[..., at:, :at], factor[..., :at, :at]
    last = slope_in_matrix(factor[..., at:, at:], slope[..., at:, at:])
    beside = slope[..., at:, :at] - 2.0 * last @ below
    beside = linalg_solve_triangular(own.mT, beside.mT, upper=True).mT
    first = slope_in_matrix(own, slope[..., :at, :at] - beside.mT @ below)
    half = 0.5 * beside
    rows = torch.cat([first, half.mT], -1), torch.cat([half, last], -1)
    return torch.cat(rows, -2)


def weighted_square(factor: Tensor, weights: Tensor) -> Tensor:
    r"""The product :math:`L^\top W L` of a lower triangular matrix with a diagonal one.

    Of a large one by blocks of columns, each times those before it: a third of the whole products.

    Arguments:
        factor: L, of shape ``(n, n)``.
        weights: The diagonal, ``(n, 1)``.
    """
    n, weighted, rows = len(factor), weights * factor, list[Tensor]()
    if n < 2 * BLOCK:
        return factor.mT @ weighted
    for start in range(0, n, BLOCK):
        end = min(start + BLOCK, n)
        row = weighted[start:, start:end].mT @ factor[start:, :end]
        rows.append(torch.nn.functional.pad(row, (0, n - end)))
    lower = torch.cat(rows).tril()
    return lower + lower.tril(-1).mT


def _diagonal_of(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).diag_embed()
