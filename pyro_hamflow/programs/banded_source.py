"""The sequential loops of banded matrices: in C++, made where a compiler is at hand, and in torch.

Bands are stored row by row: entry ``k`` of row ``i`` is the matrix's at ``(i, i - k)``.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from string import Template

import torch
from torch import Tensor

from pyro_hamflow.programs.machine_code import compiler, libraries
from pyro_hamflow.programs.machine_code.store import key_of, user_store

_SOURCE = Template("""
void factorise_$suffix(long batch, long n, long q, const $real *matrix, $real *root) {
  for (long r = 0; r < batch; r++, matrix += n * q, root += n * q)
    for (long i = 0; i < n; i++) {
      long m = i < q - 1 ? i : q - 1;
      for (long k = q - 1; k > m; k--) root[i * q + k] = 0;
      for (long k = m; k >= 0; k--) {
        long j = i - k;
        $real t = matrix[i * q + k];
        for (long c = 1; k + c <= m; c++) t -= root[i * q + k + c] * root[j * q + c];
        root[i * q + k] = k ? t / root[j * q] : $sqrt(t);
      }
    }
}
void factorise_adjoint_$suffix(long batch, long n, long q, const $real *root, $real *slope,
                               $real *result) {
  for (long r = 0; r < batch; r++, root += n * q, slope += n * q, result += n * q)
    for (long i = n - 1; i >= 0; i--) {
      long m = i < q - 1 ? i : q - 1;
      for (long k = m + 1; k < q; k++) result[i * q + k] = 0;
      for (long k = 0; k <= m; k++) {
        long j = i - k;
        $real t = slope[i * q + k] / root[j * q];
        if (k) slope[j * q] -= t * root[i * q + k]; else t /= 2;
        result[i * q + k] = t;
        for (long c = 1; k + c <= m; c++) {
          slope[i * q + k + c] -= t * root[j * q + c];
          slope[j * q + c] -= t * root[i * q + k + c];
        }
      }
    }
}
void solve_$suffix(long batch, long count, long n, long q, long transposed, const $real *root,
                   const $real *vectors, $real *result) {
  for (long r = 0; r < batch; r++, root += n * q)
    for (long w = 0; w < count; w++, vectors += n, result += n)
      if (transposed)
        for (long i = n - 1; i >= 0; i--) {
          $real t = vectors[i];
          for (long k = 1; k < q && i + k < n; k++) t -= root[(i + k) * q + k] * result[i + k];
          result[i] = t / root[i * q];
        }
      else
        for (long i = 0; i < n; i++) {
          $real t = vectors[i];
          for (long k = 1; k < q && k <= i; k++) t -= root[i * q + k] * result[i - k];
          result[i] = t / root[i * q];
        }
}
void outer_$suffix(long batch, long count, long n, long q, const $real *left, const $real *right,
                   $real *result) {
  for (long r = 0; r < batch; r++, result += n * q) {
    for (long i = 0; i < n * q; i++) result[i] = 0;
    for (long w = 0; w < count; w++, left += n, right += n)
      for (long i = 0; i < n; i++)
        for (long k = 0; k < q && k <= i; k++) result[i * q + k] += left[i] * right[i - k];
  }
}
""")

_KINDS = {torch.float64: ("double", "double", "sqrt"), torch.float32: ("float", "float", "sqrtf")}


@cache
def library() -> ctypes.CDLL | None:
    """The loops in machine code, made once and kept.

    Returns:
        The library; none where no compiler works, and torch does them more slowly.
    """
    kinds = map(text, _KINDS)
    source = "\n".join(["#include <math.h>", 'extern "C" {', *kinds, "}"])
    key = key_of(source, compiler.description())
    try:
        return libraries.library(key, partial(compiler.compiled, source), user_store())
    except compiler.NotCompiled:
        return None


def text(dtype: torch.dtype) -> str:
    """The loops over numbers of a type, as functions in C++."""
    real, suffix, root = _KINDS[dtype]
    return _SOURCE.substitute(real=real, suffix=suffix, sqrt=root)


def full_name(name: str, dtype: torch.dtype) -> str:
    """A loop's name for numbers of a type."""
    return f"{name}_{_KINDS[dtype][1]}"


def call(name: str, sizes: tuple[int, ...], *tensors: Tensor) -> bool:
    """Runs a loop of the library on contiguous tensors of one type, the last of them its result.

    Returns:
        Whether there is such a loop.
    """
    dtype, code = tensors[0].dtype, library()
    if dtype not in _KINDS or code is None:
        return False
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    getattr(code, full_name(name, dtype))(*map(ctypes.c_long, sizes), *pointers)
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
