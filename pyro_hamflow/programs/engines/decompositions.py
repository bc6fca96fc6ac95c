"""Operations that neither Inductor nor this engine has loops for, in terms of others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.triangular import cholesky_solve


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


def _layer_norm(
    a: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(-len(shape), 0))
    mean = a.mean(dims, keepdim=True)
    scale = (_variance(a, dims, correction=0, keepdim=True) + eps).rsqrt()
    found = (a - mean) * scale
    found = found if weight is None else found * weight
    return found if bias is None else found + bias, mean, scale


def _cholesky_inverse(factor: Tensor, upper: bool = False) -> Tensor:  # noqa: FBT001, FBT002
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return cholesky_solve(one.expand_as(factor), factor, upper)


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    return a[..., :, None, :] - b[..., None, :, :]


def _distances(a: Tensor, b: Tensor, p: float, mode: int | None = None) -> Tensor:
    gaps = _gaps(a, b).abs()
    if p == 2.0:
        return gaps.square().sum(-1).sqrt()
    if math.isinf(p):
        return gaps.amax(-1)
    return gaps.sum(-1) if p == 1.0 else gaps.pow(p).sum(-1).pow(1.0 / p)


def _distances_adjoint(slope: Tensor, a: Tensor, b: Tensor, p: float, found: Tensor) -> Tensor:
    """By the first points; points at the same place do not pull at each other."""
    gaps, far = _gaps(a, b), found[..., None]
    if p == 1.0:
        pull = gaps.sign()
    elif math.isinf(p):
        pull = gaps.sign() * (gaps.abs() == far)
    else:
        shares = gaps.abs() / torch.where(far == 0.0, 1.0, far)
        pull = torch.where(shares == 0.0, 0.0, gaps.sign() * shares.pow(p - 1.0))
    return (slope[..., None] * pull).sum(-2)


def _euclidean(a: Tensor, b: Tensor) -> Tensor:
    return _distances(a, b, 2.0)


def _places(
    edges: Tensor,
    a: Tensor,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Tensor | None = None,
) -> Tensor:
    """How many edges lie before each number; all of them before one that is none."""
    if sorter is not None:
        edges = edges.gather(-1, sorter)
    edges, values = edges[..., None, :], a.reshape(*edges.shape[:-1], -1)[..., None]
    right = right or side == "right"
    before = torch.logical_not(edges > values if right else edges >= values)
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64).reshape(a.shape)


def _place_of_number(edges: Tensor, a: float, **settings: Any) -> Tensor:
    return _places(edges, edges.new_tensor(a), **settings)


def _buckets(a: Tensor, edges: Tensor, *, out_int32: bool = False, right: bool = False) -> Tensor:
    return _places(edges, a, out_int32=out_int32, right=right)


def _product(a: Tensor, b: Tensor) -> Tensor:
    return torch.ops.pyro_hamflow.product(a.contiguous(), b.contiguous())


def _windows(a: Tensor, size: int, stride: int, dilation: int, groups: int) -> Tensor:
    """What a kernel of a size sees at each place: ``(batch, group, place, channel * size)``."""
    batch, channels, _ = a.shape
    seen = a.unfold(2, dilation * (size - 1) + 1, stride)[..., ::dilation]
    seen = seen.reshape(batch, groups, channels // groups, seen.shape[2], size)
    return seen.transpose(2, 3).flatten(3)


def _convolution(
    a: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001  # torch's order
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    if transposed or a.dim() != 3:
        raise NotImplementedError("a convolution that is transposed or of two dimensions")
    seen = _windows(_padded(a, padding[0]), weight.shape[2], stride[0], dilation[0], groups)
    kernels = weight.reshape(groups, weight.shape[0] // groups, -1).mT
    found = _product(seen, kernels.expand(len(a), -1, -1, -1))
    found = found.mT.reshape(len(a), weight.shape[0], -1)
    return found if bias is None else found + bias[:, None]


def _padded(a: Tensor, padding: int) -> Tensor:
    return torch.nn.functional.pad(a, (padding, padding))


def _convolution_adjoint(
    slope: Tensor,
    a: Tensor,
    weight: Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,  # noqa: FBT001  # torch's order
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if transposed or a.dim() != 3 or stride[0] != 1:
        raise NotImplementedError("a convolution that is transposed, strided or of two dimensions")
    size, channels = weight.shape[2], weight.shape[0] // groups
    by_input = by_weight = None
    if wanted[0]:
        turned = weight.reshape(groups, channels, -1, size).transpose(1, 2).flip(3)
        around = dilation[0] * (size - 1) - padding[0]
        turned = turned.reshape(-1, channels, size)
        rest = ([1], [around], dilation, False, [0], groups)
        by_input = _convolution(slope, turned, None, *rest)
    if wanted[1]:
        seen = _windows(_padded(a, padding[0]), size, 1, dilation[0], groups)
        slopes = slope.reshape(len(a), groups, channels, -1)
        by_weight = _product(slopes, seen).sum(0).reshape(weight.shape)
    return by_input, by_weight, slope.sum((0, 2)) if wanted[2] else None


_aten = torch.ops.aten
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    _aten.var.correction: _variance,
    _aten.std.correction: _deviation,
    _aten.var_mean.correction: _variance_and_mean,
    _aten.native_layer_norm.default: _layer_norm,
    _aten.cholesky_solve.default: cholesky_solve,
    _aten.cholesky_inverse.default: _cholesky_inverse,
    _aten._cdist_forward.default: _distances,
    _aten._cdist_backward.default: _distances_adjoint,
    _aten._euclidean_dist.default: _euclidean,
    _aten.searchsorted.Tensor: _places,
    _aten.searchsorted.Scalar: _place_of_number,
    _aten.bucketize.Tensor: _buckets,
    torch.bucketize: _buckets,
    torch.searchsorted: _places,
    _aten.convolution.default: _convolution,
    torch.convolution: _convolution,
    _aten.convolution_backward.default: _convolution_adjoint,
}
