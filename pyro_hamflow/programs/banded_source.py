"""The sequential loops of banded matrices: in C++, made where a compiler is at hand, and in torch.

Bands are stored row by row: entry ``k`` of row ``i`` is the matrix's at ``(i, i - k)``.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from pyro_hamflow.programs.machine_code import compiler, libraries
from pyro_hamflow.programs.machine_code.store import key_of, user_store

_ENGINES = Path(__file__).parent / "engines"
_HEADERS = (_ENGINES / "matrices.hpp", _ENGINES / "banded.hpp")
# How many sizes and tensors each loop takes.
LOOPS = {
    "factorise": (3, 2),
    "factorise_adjoint": (3, 3),
    "root": (3, 3),
    "root_adjoint": (3, 5),
    "solve": (5, 3),
    "outer": (4, 3),
    "times": (5, 3),
}
_KINDS = {torch.float64: "double", torch.float32: "float"}


@cache
def library() -> ctypes.CDLL | None:
    """The loops in machine code, made once and kept.

    Returns:
        The library; none where no compiler works, and torch does them more slowly.
    """
    exported = (_exported(name, kind) for name in LOOPS for kind in _KINDS.values())
    source = "\n".join([*(header.read_text() for header in _HEADERS), *exported])
    key = key_of(source, compiler.description())
    try:
        return libraries.library(key, partial(compiler.compiled, source), user_store())
    except compiler.NotCompiled:
        return None


def _exported(name: str, kind: str) -> str:
    """A loop over numbers of a type as a function of the library."""
    sizes, tensors = (
        [f"{letter}{i}" for i in range(n)] for letter, n in zip("nt", LOOPS[name], strict=True)
    )
    given = [*(f"long {size}" for size in sizes), *(f"{kind} *{tensor}" for tensor in tensors)]
    call = f"banded::{name}({', '.join([*sizes, *tensors])});"
    return f'extern "C" void {name}_{kind}({", ".join(given)}) {{ {call} }}'


def call(name: str, sizes: tuple[int, ...], *tensors: Tensor) -> bool:
    """Runs a loop of the library on contiguous tensors, the last of them its results.

    Returns:
        Whether there is such a loop: only for tensors that all have one of its types.
    """
    dtype, code = tensors[0].dtype, library()
    if dtype not in _KINDS or code is None:
        return False
    if any(tensor.dtype != dtype for tensor in tensors):
        return False  # the loops read and write past numbers of half the size
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(code, f"{name}_{_KINDS[dtype]}")(*map(ctypes.c_long, sizes), *pointers)
    return True


def factorise(matrix: Tensor) -> Tensor:
    """The bands of the Cholesky factor, ``(batch, n, q)``; what :func:`call` does in torch."""
    n, q = matrix.shape[1:]
    root = torch.zeros_like(matrix)
    for i in range(n):
        m = min(i, q - 1)
        for k in range(m, -1, -1):
            t = matrix[:, i, k]
            if k < m:
                t = t - (root[:, i, k + 1 : m + 1] * root[:, i - k, 1 : m - k + 1]).sum(-1)
            root[:, i, k] = t / root[:, i - k, 0] if k else t.sqrt()
    return root


def factorise_adjoint(root: Tensor, slope: Tensor) -> Tensor:
    """From slopes in the factor to those in the matrix; ``slope`` is written over."""
    n, q = root.shape[1:]
    result = torch.zeros_like(root)
    for i in range(n - 1, -1, -1):
        m = min(i, q - 1)
        for k in range(m + 1):
            j = i - k
            t = slope[:, i, k] / root[:, j, 0]
            if k:
                slope[:, j, 0] -= t * root[:, i, k]
            else:
                t = t / 2
            result[:, i, k] = t
            if k < m:
                own, other = root[:, i, k + 1 : m + 1].clone(), root[:, j, 1 : m - k + 1].clone()
                slope[:, i, k + 1 : m + 1] -= t[:, None] * other
                slope[:, j, 1 : m - k + 1] -= t[:, None] * own
    return result


def solve(root: Tensor, vectors: Tensor, *, transposed: bool) -> Tensor:
    """Solutions for ``vectors``, of shape ``(batch, count, n)``."""
    n, q = root.shape[1:]
    result = torch.zeros_like(vectors)
    for i in range(n - 1, -1, -1) if transposed else range(n):
        t = vectors[:, :, i]
        for k in range(1, min(q, n - i if transposed else i + 1)):
            row, other = (i + k, i + k) if transposed else (i, i - k)
            t = t - root[:, row, k, None] * result[:, :, other]
        result[:, :, i] = t / root[:, i, 0, None]
    return result


def outer(left: Tensor, right: Tensor, width: int) -> Tensor:
    """The lower bands of the sum over ``count`` of left times right transposed."""
    result = left.new_zeros(left.shape[0], left.shape[2], width)
    for k in range(min(width, left.shape[2])):
        result[:, k:, k] = (left[:, :, k:] * right[:, :, : left.shape[2] - k]).sum(1)
    return result


def times(root: Tensor, vectors: Tensor, *, transposed: bool) -> Tensor:
    """Products of the factor with ``vectors``, of shape ``(batch, count, n)``."""
    n, q = root.shape[1:]
    result = root[:, None, :, 0] * vectors
    for k in range(1, min(q, n)):
        row = root[:, None, k:, k]
        if transposed:
            result[..., : n - k] += row * vectors[..., k:]
        else:
            result[..., k:] += row * vectors[..., : n - k]
    return result


def dominated(bands: Tensor) -> Tensor:
    """A matrix with the same entries beside the diagonal, and enough on it to be positive."""
    n, width = bands.shape[-2:]
    least = 1e-6 * bands[..., 0].abs().amax(-1, keepdim=True)
    scale = bands[..., 0].abs().clamp(min=least).sqrt()
    beside = torch.zeros_like(scale)
    for k in range(1, min(width, n)):
        relative = bands[..., k:, k].abs() / (scale[..., k:] * scale[..., :-k])
        beside = beside + torch.nn.functional.pad(relative, (k, 0))
        beside = beside + torch.nn.functional.pad(relative, (0, k))
    diagonal = torch.maximum(bands[..., 0], scale.square() * beside * 1.01 + least)
    return torch.cat([diagonal[..., None], bands[..., 1:]], -1)


def root(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of a matrix, or of a dominated one where it has none; and where, ``(batch,)``."""
    found = factorise(matrix)
    mended = ~found[..., 0].log().sum(-1).isfinite()
    other = factorise(dominated(matrix))
    return torch.where(mended[:, None, None], other, found), mended.to(matrix)


def root_adjoint(matrix: Tensor, factor: Tensor, mended: Tensor, slope: Tensor) -> Tensor:
    """From slopes in what :func:`root` finds to those in the matrix; ``slope`` is written over."""
    found = factorise_adjoint(factor, slope)
    return torch.where(mended[:, None, None] != 0, dominated_adjoint(matrix, found), found)


def dominated_adjoint(bands: Tensor, slope: Tensor) -> Tensor:
    """From slopes in what :func:`dominated` finds to those in the matrix.

    Written out: a function transformed within an operator cannot be recorded.
    """
    n, width = bands.shape[-2:]
    pad, diagonal, size = torch.nn.functional.pad, bands[..., 0], bands[..., 0].abs()
    least = 1e-6 * size.amax(-1, keepdim=True)
    scale = size.clamp(min=least).sqrt()
    raised = torch.where(diagonal < dominated(bands)[..., 0], slope[..., 0], 0.0)
    of_sum, of_scale = 1.01 * scale.square() * raised, torch.zeros_like(scale)
    result = slope.clone()
    for k in range(1, min(width, n)):
        sizes = scale[..., k:] * scale[..., :-k]
        relative = bands[..., k:, k].abs() / sizes
        of_relative = of_sum[..., k:] + of_sum[..., :-k]
        result[..., k:, k] += of_relative * bands[..., k:, k].sign() / sizes
        for own, side in ((k, (k, 0)), (0, (0, k))):
            here = slice(own, n - k + own)
            gained = 2.02 * raised[..., here] * scale[..., here]
            lost = of_relative / scale[..., here]
            of_scale = of_scale + pad((gained - lost) * relative, side)
    of_size, is_least = of_scale / (2.0 * scale), size < least
    of_least = raised.sum(-1) + torch.where(is_least, of_size, 0.0).sum(-1)
    of_size = torch.where(is_least, 0.0, of_size)
    of_size.scatter_add_(-1, size.argmax(-1, keepdim=True), 1e-6 * of_least[..., None])
    result[..., 0] = slope[..., 0] - raised + of_size * diagonal.sign()
    return result
