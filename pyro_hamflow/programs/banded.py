r"""Symmetric matrices with few bands: factors, solutions, determinants and Gaussian draws.

A symmetric matrix Q whose entries vanish further than p from the diagonal is given by its lower
*bands*, a tensor of shape ``(*batch, n, p + 1)`` whose entry ``[i, k]`` is :math:`Q_{i, i-k}`;
those with ``i < k`` are never read. Its Cholesky factor, the *root* :math:`Q = L L^\top`, has the
same shape. All takes time and memory in proportion to n, and so do the gradients, whose rules are
written out. The loops over n are operators of torch
(:mod:`~pyro_hamflow.programs.banded_operators`): machine code where a C++ compiler is at hand,
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

import torch
from torch import Tensor

from pyro_hamflow.programs import banded_operators as operators

_FEW = 3  # bands whose entries are chosen one by one


def cholesky(bands: Tensor) -> Tensor:
    """The root of a positive definite matrix.

    Arguments:
        bands: Its lower bands, of shape ``(*batch, n, p + 1)``.

    Returns:
        Those of its lower Cholesky factor, of the same shape; with NaN where there is none.
    """
    return operators.factorise(bands.reshape(-1, *bands.shape[-2:])).reshape(bands.shape)


def nearest_root(bands: Tensor) -> Tensor:
    """The root of a matrix, which is made dominated by its diagonal where it has none.

    Arguments:
        bands: Its lower bands, of shape ``(*batch, n, p + 1)``.

    Returns:
        Those of the factor, of the same shape.
    """
    if bands.shape[-1] == 1:
        return bands.clamp(min=torch.finfo(bands.dtype).tiny).sqrt()
    return operators.root(bands.reshape(-1, *bands.shape[-2:]))[0].reshape(bands.shape)


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
    return operators.solve(root.reshape(-1, *root.shape[-2:]), flat, transposed).reshape(
        vectors.shape
    )


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
    if width > _FEW:
        halves = [_times(bands, vectors, transposed=side) for side in (False, True)]
        return halves[0] + halves[1] - bands[..., 0] * vectors
    result = bands[..., 0] * vectors
    for k in range(1, min(width, n)):
        band = bands[..., k:, k]
        result = result + torch.nn.functional.pad(band * vectors[..., :-k], (k, 0))
        result = result + torch.nn.functional.pad(band * vectors[..., k:], (0, k))
    return result


def multiply_root(root: Tensor, vectors: Tensor, *, transposed: bool = False) -> Tensor:
    r"""The product of L, or of its transpose, with vectors of shape ``(*batch, n)``."""
    n, width = root.shape[-2:]
    if width > _FEW:
        return _times(root, vectors, transposed=transposed)
    result = root[..., 0] * vectors
    for k in range(1, min(width, n)):
        band = root[..., k:, k]
        pair = (vectors[..., k:], (0, k)) if transposed else (vectors[..., :-k], (k, 0))
        result = result + torch.nn.functional.pad(band * pair[0], pair[1])
    return result


def _times(root: Tensor, vectors: Tensor, *, transposed: bool) -> Tensor:
    """The same by the loop that does all bands at once."""
    shape = torch.broadcast_shapes(root.shape[:-1], vectors.shape)
    if root.dim() == 2:  # noqa: PLR2004  # of one matrix, which is read once for all vectors
        flat = vectors.reshape(1, -1, shape[-1])
        found = operators.times(root[None], flat, transposed)
    else:
        wide = root.expand(*shape, root.shape[-1]).reshape(-1, *root.shape[-2:])
        flat = vectors.expand(shape).reshape(-1, 1, shape[-1])
        found = operators.times(wide, flat, transposed)
    return found.reshape(shape)


def outer(left: Tensor, right: Tensor, width: int) -> Tensor:
    """The lower bands, ``(n, width)``, of the product of a column with a row, both ``(n,)``."""
    return operators.outer(left[None, None], right[None, None], width)[0]


def dense(bands: Tensor) -> Tensor:
    """The whole symmetric matrix, of shape ``(*batch, n, n)``.

    Entry ``k`` of row ``i`` belongs into column ``i - k``: rows of one number more, read one after
    the other as rows of n, are moved by one place each.
    """
    n = bands.shape[-2]
    known = bands[..., :n].flip(-1)
    rows = torch.nn.functional.pad(known, (n - known.shape[-1], 1))
    lower = rows.flatten(-2)[..., n - 1 : n - 1 + n * n].unflatten(-1, (n, n)).tril()
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
    if width <= _FEW:  # choices in place of indices: machine code makes vectors of them
        zero, bands = products.new_zeros(()), []
        for k in range(width):
            owner = torch.where(columns[:, k] < 0, -1, columns[:, k] % len(products))
            parts = [torch.where(owner == c, part, zero) for c, part in enumerate(products)]
            bands.append(sum(parts[1:], start=parts[0]))
        return torch.stack(bands, -1)
    index = (columns % len(products)).expand(*products.shape[1:], width)
    return products.movedim(0, -1).gather(-1, index) * (columns >= 0)
