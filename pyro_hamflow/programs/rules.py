"""Operations in other words, where those of torch cannot be batched or would fail for one row.

The first rules are for a graph of one chain: they leave pure operations whose shapes are known and
that :func:`torch.func.vmap` has rules for. Others make of a batched graph what is faster.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions.util import broadcast_shape  # torch's takes a third of a second to import
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload

from pyro_hamflow.programs.graph_recorder import Rule, nan_where, nan_where_failed

_aten = torch.ops.aten
_SOLVE = _aten.linalg_solve_triangular.default


# --- for one chain ------------------------------------------------------------------------------


def _index(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Indexes by numbers in place of masks: only then are shapes known before a program runs."""
    if not any(i is not None and i.dtype == torch.bool for i in indices):
        return NotImplemented
    return _aten.index.Tensor(tensor, _numbers(indices))


def _index_put(tensor: Tensor, indices: list[Tensor | None], *rest: Any) -> Tensor:
    if not any(i is not None and i.dtype == torch.bool for i in indices):
        return NotImplemented
    return _aten.index_put.default(tensor, _numbers(indices), *rest)


def _masked_select(tensor: Tensor, mask: Tensor) -> Tensor:
    shape = broadcast_shape(tensor.shape, mask.shape)
    return tensor.expand(shape)[mask.expand(shape).nonzero().unbind(-1)]


def _numbers(indices: list[Tensor | None]) -> list[Tensor | None]:
    numbers: list[Tensor | None] = []
    for i in indices:
        numbers += [i] if i is None or i.dtype != torch.bool else i.nonzero().unbind(-1)
    return numbers


def _slice_scatter(
    tensor: Tensor,
    source: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    """Gives a slice bounds that count from the left and lie within the tensor."""
    bounds = range(*slice(start, end, step).indices(tensor.shape[dim]))
    if (start, end) == (bounds.start, bounds.stop):
        return NotImplemented
    return _aten.slice_scatter.default(tensor, source, dim, bounds.start, bounds.stop, step)


def _select_scatter(tensor: Tensor, source: Tensor, dim: int, index: int) -> Tensor:
    """Under ``vmap`` torch gets the gradient of a selection's source wrong, of a slice's not."""
    index %= tensor.shape[dim]
    return tensor.slice_scatter(source.unsqueeze(dim), dim, index, index + 1)


def _as_strided(
    tensor: Tensor, size: list[int], stride: list[int], offset: int | None = 0
) -> Tensor:
    """Takes a view across dimensions by the numbers of its elements."""
    places = _places(tensor, size, stride, offset)
    return tensor.reshape(-1)[places.reshape(-1)].reshape(size)


def _as_strided_scatter(
    tensor: Tensor, source: Tensor, size: list[int], stride: list[int], offset: int | None = 0
) -> Tensor:
    places = _places(tensor, size, stride, offset).reshape(-1)
    flat = tensor.reshape(-1).index_put((places,), source.reshape(-1))
    return flat.reshape(tensor.shape)


def _places(tensor: Tensor, size: list[int], stride: list[int], offset: int | None) -> Tensor:
    """Which elements of a tensor a view of its memory shows."""
    length = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = torch.zeros(length, dtype=torch.long, device=tensor.device)
    numbers = torch.arange(tensor.numel(), device=tensor.device).reshape(tensor.shape)
    memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(numbers)
    return memory.as_strided(size, stride, offset or 0)


def _copy(tensor: Tensor, source: Tensor, *_: Any) -> Tensor:
    if source.shape == tensor.shape and source.dtype == tensor.dtype:
        return NotImplemented
    return source.to(tensor).expand(tensor.shape)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """The product of a matrix and a vector for what it is: of others ``vmap`` copies the matrix.

    ``einsum``, ``tensordot`` and ``inner`` make a batch of one of it.
    """
    if left.dim() == 3:
        return _product(left[0], right[0])[None] if len(left) == 1 else NotImplemented
    if right.shape[-1] == 1:
        return _aten.mv.default(left, right[:, 0])[:, None]
    if left.shape[0] == 1:
        return _aten.mv.default(right.mT, left[0])[None]
    return _aten.mm.default(left, right)


def _log_sigmoid_slope(slope: Tensor, tensor: Tensor, buffer: Tensor) -> Tensor:
    """Gives a slope that all rows share to each: torch takes its shape for the result's, and warns.

    The terms that are alike in a loop's graph have such slopes.
    """
    shape = broadcast_shape(slope.shape, tensor.shape)
    if slope.shape == shape:
        return NotImplemented
    return _aten.log_sigmoid_backward.default(slope.expand(shape), tensor, buffer)


def _has_no_batching_rule(target: OpOverload) -> bool:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = ("FuncTorchBatched", "FuncTorchBatchedDecomposition", "CompositeImplicitAutograd")
    return not any(has(target.name(), key) for key in keys)


_DECOMPOSED = {
    target: decomposition
    for target, decomposition in decomposition_table.items()
    if isinstance(target, torch._ops.OpOverload)
    and not target._schema.is_mutable
    and torch.Tag.nondeterministic_seeded not in target.tags
    and _has_no_batching_rule(target)
}

PURE: dict[Any, Rule] = _DECOMPOSED | {
    _aten.index.Tensor: _index,
    _aten.index_put.default: _index_put,
    _aten.masked_select.default: _masked_select,
    _aten.slice_scatter.default: _slice_scatter,
    _aten.select_scatter.default: _select_scatter,
    _aten.as_strided.default: _as_strided,
    _aten.as_strided_scatter.default: _as_strided_scatter,
    _aten.copy.default: _copy,
    _aten.log_sigmoid_backward.default: _log_sigmoid_slope,
    _aten.bmm.default: _product,
    _aten.mm.default: _product,
}


# --- whatever the values ------------------------------------------------------------------------


def _of_finite(factorise: Any) -> Rule:
    """A factorisation that is NaN where its matrix has infinite numbers or NaN, and no error."""

    def rule(matrix: Tensor, *args: Any, **kwargs: Any) -> Any:
        failed = ~matrix.isfinite().all(-1).all(-1)
        instead = torch.eye(*matrix.shape[-2:], dtype=matrix.dtype, device=matrix.device)
        matrix = torch.where(failed[..., None, None], instead, matrix)
        results = factorise(matrix, *args, **kwargs)
        if isinstance(results, Tensor):
            return nan_where(results, failed)
        return tuple(nan_where(result, failed) for result in results)

    return rule


def _cholesky(matrix: Tensor, *upper: bool) -> Tensor:
    factorise = nan_where_failed(_aten.linalg_cholesky_ex.default)
    return factorise(matrix, upper=any(upper))[0]


def _cholesky_inverse(triangle: Tensor, *upper: bool) -> Tensor:
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    failed = ((diagonal == 0.0) | ~diagonal.isfinite()).any(-1)
    instead = torch.eye(triangle.shape[-1], dtype=triangle.dtype, device=triangle.device)
    triangle = torch.where(failed[..., None, None], instead, triangle)
    return nan_where(_aten.cholesky_inverse.default(triangle, *upper), failed)


UNFAILING: dict[Any, Rule] = {_aten.cholesky_inverse.default: _cholesky_inverse} | {
    target: _of_finite(target)
    for target in (
        _aten._linalg_svd.default,
        _aten._linalg_eigh.default,
        _aten.linalg_eig.default,
        _aten.linalg_pinv.atol_rtol_tensor,
        _aten.linalg_lstsq.default,
    )
}
if hasattr(_aten, "cholesky"):  # torch.cholesky, which is no more from torch 2.14 on
    UNFAILING[_aten.cholesky.default] = _cholesky


# --- for many chains ----------------------------------------------------------------------------


def _solve_together(
    triangle: Tensor, right: Tensor, *, left: bool = True, **settings: bool
) -> Tensor:
    """Solves for a whole batch as for one matrix where all share a triangle.

    The operation itself would copy the triangle for each of the batch.
    """
    if triangle.shape[:-2].numel() != 1 or not triangle.dim() <= right.dim() > 2:
        return NotImplemented
    folded = right.movedim(-2, 0) if left else right
    matrix = folded.reshape(len(folded), -1) if left else folded.reshape(-1, folded.shape[-1])
    solved = _SOLVE(triangle.reshape(triangle.shape[-2:]), matrix, left=left, **settings)
    return solved.reshape(folded.shape).movedim(0, -2) if left else solved.reshape(folded.shape)


def _fill(like: Rule) -> Rule:
    """Makes a tensor of one repeated number a constant, which holds that number alone.

    Only in graphs that will not be batched any more: some rules of batching rely on the gradient of
    a result to have its shape.
    """

    def constant(example: Tensor, *value: Any, **settings: Any) -> Tensor:
        one = torch.empty((), dtype=example.dtype, device=example.device)
        return like(one, *value, **settings).expand(example.shape)

    return constant


def _look_up(tensor: Tensor, indices: list[Tensor | None]) -> Tensor:
    """Reads along the last dimension by numbers, as of subjects: a gather is several times faster.

    So is a scattered sum in its gradient.
    """
    numbers = _of_last_dimension(tensor, indices)
    if numbers is None:
        return NotImplemented
    return tensor.gather(-1, numbers.expand(*tensor.shape[:-1], len(numbers)))


def _sum_at(
    tensor: Tensor,
    indices: list[Tensor | None],
    values: Tensor,
    accumulate: bool = False,  # noqa: FBT001, FBT002  # as torch calls it
) -> Tensor:
    numbers = _of_last_dimension(tensor, indices)
    if numbers is None or not accumulate or values.shape != (*tensor.shape[:-1], len(numbers)):
        return NotImplemented
    return tensor.scatter_add(-1, numbers.expand(values.shape), values)


def _of_last_dimension(tensor: Tensor, indices: list[Tensor | None]) -> Tensor | None:
    """A list of numbers that indexes the last dimension alone, if that is what indices are."""
    *others, numbers = indices
    alone = len(indices) == tensor.dim() and all(index is None for index in others)
    if not alone or numbers is None or numbers.dim() != 1 or numbers.dtype != torch.long:
        return None
    return numbers.remainder(tensor.shape[-1])  # they may count from the right


BATCHED: dict[Any, Rule] = {
    _SOLVE: _solve_together,
    _aten.index.Tensor: _look_up,
    _aten.index_put.default: _sum_at,
} | {
    like: _fill(like)
    for like in (
        _aten.zeros_like.default,
        _aten.ones_like.default,
        _aten.full_like.default,
    )
}
