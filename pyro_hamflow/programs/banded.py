r"""Symmetric matrices with few bands: factors, solutions, determinants and Gaussian draws.

A symmetric matrix Q whose entries vanish further than p from the diagonal is given by its lower
*bands*, a tensor of shape ``(*batch, n, p + 1)`` whose entry ``[i, k]`` is :math:`Q_{i, i-k}`;
those with ``i < k`` are never read. Its Cholesky factor, the *root* :math:`Q = L L^\top`, has the
same shape. All takes time and memory in proportion to n, and so do the gradients, whose rules are
written out. The loops over n are operators of torch: machine code where a C++ compiler is at hand,
torch's own operations where none is. They can be recorded, batched by ``torch.func.vmap``, and
differentiated once by ``torch.autograd``. A matrix that is not positive definite has a root with
NaN.

A path :math:`x_1 \dots x_T` of states that have d numbers each and depend on the last m of them has
a precision of :math:`(m + 1) d - 1` bands, states one after the other.

Example:
    >>> bands = torch.tensor([[2.0, 0.0], [2.0, -1.0], [2.0, -1.0]], dtype=torch.float64)
    >>> root = cholesky(bands)
    >>> log_det(root).exp()
    tensor(4.0000, dtype=torch.float64)
    >>> solve_both(root, multiply(bands, torch.tensor([1.0, 2.0, 3.0]).double()))
    tensor([1.0000, 2.0000, 3.0000], dtype=torch.float64)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs import banded_source as source


def cholesky(bands: Tensor) -> Tensor:
    """The root of a positive definite matrix.

    Arguments:
        bands: Its lower bands, of shape ``(*batch, n, p + 1)``.

    Returns:
        Those of its lower Cholesky factor, of the same shape; with NaN where there is none.
    """
    return _factorise(bands.reshape(-1, *bands.shape[-2:])).reshape(bands.shape)


def solve(root: Tensor, vectors: Tensor, *, transposed: bool = False) -> Tensor:
    r"""The solution x of :math:`L x = b`, or of :math:`L^\top x = b`.

    Arguments:
        root: The bands of L, of shape ``(*batch, n, p + 1)``.
        vectors: Of shape ``(*batch, n)``, or ``(*batch, count, n)``.
        transposed: Which of the two is meant.

    Returns:
        Of the shape of ``vectors``.
    """
    many = vectors if vectors.dim() == root.dim() else vectors.unsqueeze(-2)
    flat = many.reshape(-1, *many.shape[-2:])
    return _solve(root.reshape(-1, *root.shape[-2:]), flat, transposed).reshape(vectors.shape)


def solve_both(root: Tensor, vectors: Tensor) -> Tensor:
    r"""The solution x of :math:`L L^\top x = b`; shapes are those of :func:`solve`."""
    return solve(root, solve(root, vectors), transposed=True)


def log_det(root: Tensor) -> Tensor:
    r"""The log determinant of :math:`L L^\top`, of shape ``(*batch)``."""
    return 2.0 * root[..., 0].log().sum(-1)


def draw(root: Tensor, linear: Tensor, noise: Tensor) -> Tensor:
    r"""Draws :math:`Q^{-1} b + L^{-\top} z` from the Gaussian of precision Q and linear term b.

    Their log density is :math:`\tfrac12 \log \det Q - \tfrac12 |z|^2 - \tfrac n2 \log 2 \pi`.

    Arguments:
        root: The root of Q, of shape ``(*batch, n, p + 1)``.
        linear: Its mean times Q, of shape ``(*batch, n)``.
        noise: z, of shape ``(*batch, n)``, or ``(*batch, count, n)``.

    Returns:
        Of the shape of ``noise``.
    """
    forward = solve(root, linear)
    if noise.dim() > linear.dim():
        forward = forward.unsqueeze(-2)
    return solve(root, forward + noise, transposed=True)


def multiply(bands: Tensor, vectors: Tensor) -> Tensor:
    """The product of a symmetric matrix with vectors of shape ``(*batch, n)``."""
    n, width = bands.shape[-2:]
    result = bands[..., 0] * vectors
    for k in range(1, min(width, n)):
        band = bands[..., k:, k]
        result = result + torch.nn.functional.pad(band * vectors[..., :-k], (k, 0))
        result = result + torch.nn.functional.pad(band * vectors[..., k:], (0, k))
    return result


def multiply_root(root: Tensor, vectors: Tensor, *, transposed: bool = False) -> Tensor:
    r"""The product of L, or of its transpose, with vectors of shape ``(*batch, n)``."""
    n, width = root.shape[-2:]
    result = root[..., 0] * vectors
    for k in range(1, min(width, n)):
        band = root[..., k:, k]
        pair = (vectors[..., k:], (0, k)) if transposed else (vectors[..., :-k], (k, 0))
        result = result + torch.nn.functional.pad(band * pair[0], pair[1])
    return result


def dense(bands: Tensor) -> Tensor:
    """The whole symmetric matrix, of shape ``(*batch, n, n)``."""
    n, width = bands.shape[-2:]
    parts = [torch.diag_embed(bands[..., k:, k], -k) for k in range(min(width, n))]
    lower = sum(parts[1:], start=parts[0])
    return lower + lower.tril(-1).mT


def bands_of(matrix: Tensor, width: int) -> Tensor:
    """The lower bands of a symmetric matrix, ``width`` of them, of shape ``(*batch, n, width)``."""
    rows = torch.arange(matrix.shape[-1], device=matrix.device)[:, None]
    columns = rows - torch.arange(width, device=matrix.device)
    return matrix[..., rows, columns.clamp(min=0)] * (columns >= 0)


def probes(like: Tensor, width: int) -> Tensor:
    """Vectors whose products with a banded symmetric matrix tell its bands (:func:`bands_seen`).

    Rows as far apart as bands reach share a vector, so that there are ``2 width - 1`` at most.

    Arguments:
        like: A vector of shape ``(*batch, n)``.
        width: How many lower bands, the diagonal included.

    Returns:
        A tensor of shape ``(count, n)``.

    Example:
        >>> probes(torch.zeros(4), 2)
        tensor([[1., 0., 0., 1.],
                [0., 1., 0., 0.],
                [0., 0., 1., 0.]])
    """
    n = like.shape[-1]
    rows, count = torch.arange(n, device=like.device), min(2 * width - 1, n)
    return (rows % count == torch.arange(count, device=like.device)[:, None]).to(like)


def bands_seen(products: Tensor, width: int) -> Tensor:
    """The lower bands, ``(*batch, n, width)``, of a symmetric matrix that has no others.

    Arguments:
        products: Those with :func:`probes`, of shape ``(count, *batch, n)``.
        width: How many.
    """
    if len(products) == 1:
        return products.movedim(0, -1)
    rows = torch.arange(products.shape[-1], device=products.device)[:, None]
    columns = rows - torch.arange(width, device=products.device)
    index = (columns % len(products)).expand(*products.shape[1:], width)
    return products.movedim(0, -1).gather(-1, index) * (columns >= 0)


# The operators. Their shapes are (batch, n, width) for bands, and (batch, count, n) for vectors.


@torch.library.custom_op("pyro_hamflow::banded_factorise", mutates_args=())
def _factorise(bands: Tensor) -> Tensor:
    matrix = bands.detach().cpu().contiguous()
    root = torch.empty_like(matrix)
    if not source.call("factorise", tuple(matrix.shape), matrix, root):
        root = source.factorise(matrix)
    return root.to(bands.device)


@torch.library.custom_op("pyro_hamflow::banded_factorise_adjoint", mutates_args=())
def _factorise_adjoint(root: Tensor, slope: Tensor) -> Tensor:
    factor = root.detach().cpu().contiguous()
    given = slope.detach().cpu().clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(factor)
    if not source.call("factorise_adjoint", tuple(factor.shape), factor, given, result):
        result = source.factorise_adjoint(factor, given)
    return result.to(root.device)


@torch.library.custom_op("pyro_hamflow::banded_solve", mutates_args=())
def _solve(root: Tensor, vectors: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
    factor, given = root.detach().cpu().contiguous(), vectors.detach().cpu().contiguous()
    result, sizes = torch.empty_like(given), (*given.shape, root.shape[-1], int(transposed))
    if not source.call("solve", sizes, factor, given, result):
        result = source.solve(factor, given, transposed=transposed)
    return result.to(root.device)


@torch.library.custom_op("pyro_hamflow::banded_outer", mutates_args=())
def _outer(left: Tensor, right: Tensor, width: int) -> Tensor:
    first, second = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    result = first.new_empty(first.shape[0], first.shape[2], width)
    if not source.call("outer", (*first.shape, width), first, second, result):
        result = source.outer(first, second, width)
    return result.to(left.device)


@_factorise.register_fake
def _(bands: Tensor) -> Tensor:
    return bands.new_empty(bands.shape)


@_factorise_adjoint.register_fake
def _(root: Tensor, slope: Tensor) -> Tensor:
    return root.new_empty(root.shape)


@_solve.register_fake
def _(root: Tensor, vectors: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
    return vectors.new_empty(vectors.shape)


@_outer.register_fake
def _(left: Tensor, right: Tensor, width: int) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[2], width)


def _keep_root(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _factorise_backward(ctx: Any, slope: Tensor) -> Tensor:
    return _factorise_adjoint(ctx.saved_tensors[0], slope)


def _keep_solution(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.transposed = inputs[2]


def _solve_backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
    root, solution = ctx.saved_tensors
    of_vectors = _solve(root, slope, not ctx.transposed)
    pair = (solution, of_vectors) if ctx.transposed else (of_vectors, solution)
    return -_outer(*pair, root.shape[-1]), of_vectors, None


_factorise.register_autograd(_factorise_backward, setup_context=_keep_root)
_solve.register_autograd(_solve_backward, setup_context=_keep_solution)


def _first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with its batch dimension first, joined to the dimension behind."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _batch_all(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The rule by which an operator of tensors, and of numbers that stay, is batched."""

    def run(info: Any, dims: Any, *args: Any) -> tuple[Tensor, int]:
        size = info.batch_size
        pairs = zip(args, dims, strict=True)
        flat = [_first(arg, dim, size) if isinstance(arg, Tensor) else arg for arg, dim in pairs]
        return operator(*flat).unflatten(0, (size, -1)), 0

    return run


def _batch_solve(info: Any, dims: Any, root: Tensor, vectors: Tensor, transposed: Any) -> Any:
    """Vectors of one root stay beside each other: it is read once for all."""
    if dims[0] is not None:
        return _batch_all(_solve)(info, dims, root, vectors, transposed)
    moved = vectors.movedim(dims[1], 1)
    result = _solve(root, moved.flatten(1, 2), transposed)
    return result.unflatten(1, moved.shape[1:3]), 1


_factorise.register_vmap(_batch_all(_factorise))
_factorise_adjoint.register_vmap(_batch_all(_factorise_adjoint))
_outer.register_vmap(_batch_all(_outer))
_solve.register_vmap(_batch_solve)
