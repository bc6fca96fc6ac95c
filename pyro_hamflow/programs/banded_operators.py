"""The sequential loops of banded matrices as operators of torch, and their rules.

Their shapes are ``(batch, n, width)`` for bands, and ``(batch, count, n)`` for vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.programs import banded_source as source


@torch.library.custom_op("pyro_hamflow::banded_factorise", mutates_args=())
def factorise(bands: Tensor) -> Tensor:
    """The factor of positive definite matrices."""
    matrix = bands.detach().cpu().contiguous()
    root = torch.empty_like(matrix)
    if not source.call("factorise", tuple(matrix.shape), matrix, root):
        root = source.factorise(matrix)
    return root.to(bands.device)


@torch.library.custom_op("pyro_hamflow::banded_factorise_adjoint", mutates_args=())
def factorise_adjoint(root: Tensor, slope: Tensor) -> Tensor:
    """From slopes in what :func:`factorise` finds to those in the matrices."""
    factor = root.detach().cpu().contiguous()
    given = slope.detach().cpu().clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(factor)
    if not source.call("factorise_adjoint", tuple(factor.shape), factor, given, result):
        result = source.factorise_adjoint(factor, given)
    return result.to(root.device)


@torch.library.custom_op("pyro_hamflow::banded_root", mutates_args=())
def root(bands: Tensor) -> tuple[Tensor, Tensor]:
    """The factor of matrices, or of dominated ones where they have none; and where."""
    matrix = bands.detach().cpu().contiguous()
    root, mended = torch.empty_like(matrix), matrix.new_empty(len(matrix))
    if not source.call("root", tuple(matrix.shape), matrix, root, mended):
        root, mended = source.root(matrix)
    return root.to(bands.device), mended.to(bands.device)


@torch.library.custom_op("pyro_hamflow::banded_root_adjoint", mutates_args=())
def root_adjoint(bands: Tensor, root: Tensor, mended: Tensor, slope: Tensor) -> Tensor:
    """From slopes in what :func:`root` finds to those in the matrices."""
    matrix, factor, where = (part.detach().cpu().contiguous() for part in (bands, root, mended))
    given = slope.detach().cpu().clone(memory_format=torch.contiguous_format)
    result = torch.empty_like(matrix)
    if not source.call("root_adjoint", tuple(matrix.shape), matrix, factor, where, given, result):
        result = source.root_adjoint(matrix, factor, where, given)
    return result.to(bands.device)


@torch.library.custom_op("pyro_hamflow::banded_solve", mutates_args=())
def solve(root: Tensor, vectors: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
    """Solutions of triangular systems, or of their transposes."""
    return _of_vectors("solve", source.solve, root, vectors, transposed=transposed)


@torch.library.custom_op("pyro_hamflow::banded_outer", mutates_args=())
def outer(left: Tensor, right: Tensor, width: int) -> Tensor:
    """The lower bands of sums over ``count`` of left times right transposed."""
    first, second = left.detach().cpu().contiguous(), right.detach().cpu().contiguous()
    result = first.new_empty(first.shape[0], first.shape[2], width)
    if not source.call("outer", (*first.shape, width), first, second, result):
        result = source.outer(first, second, width)
    return result.to(left.device)


@torch.library.custom_op("pyro_hamflow::banded_times", mutates_args=())
def times(root: Tensor, vectors: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
    """Products of triangular matrices, or of their transposes, with vectors."""
    return _of_vectors("times", source.times, root, vectors, transposed=transposed)


def _of_vectors(
    name: str, slow: Callable[..., Tensor], root: Tensor, vectors: Tensor, *, transposed: bool
) -> Tensor:
    """What a loop makes of triangular matrices and vectors, or torch where there is no loop."""
    factor, given = root.detach().cpu().contiguous(), vectors.detach().cpu().contiguous()
    result, sizes = torch.empty_like(given), (*given.shape, root.shape[-1], int(transposed))
    if not source.call(name, sizes, factor, given, result):
        result = slow(factor, given, transposed=transposed)
    return result.to(root.device)


@factorise.register_fake
def _(bands: Tensor) -> Tensor:
    return bands.new_empty(bands.shape)


@factorise_adjoint.register_fake
def _(root: Tensor, slope: Tensor) -> Tensor:
    return root.new_empty(root.shape)


@root.register_fake
def _(bands: Tensor) -> tuple[Tensor, Tensor]:
    return bands.new_empty(bands.shape), bands.new_empty(bands.shape[:1])


@root_adjoint.register_fake
def _(bands: Tensor, root: Tensor, mended: Tensor, slope: Tensor) -> Tensor:
    return bands.new_empty(bands.shape)


@solve.register_fake
@times.register_fake
def _(root: Tensor, vectors: Tensor, transposed: bool) -> Tensor:  # noqa: FBT001
    return vectors.new_empty(vectors.shape)


@outer.register_fake
def _(left: Tensor, right: Tensor, width: int) -> Tensor:
    return left.new_empty(left.shape[0], left.shape[2], width)


def _keep_root(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output)


def _factorise_backward(ctx: Any, slope: Tensor) -> Tensor:
    return factorise_adjoint(ctx.saved_tensors[0], slope)


def _keep_both(ctx: Any, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[0], *output)


def _root_backward(ctx: Any, slope: Tensor, _: Tensor) -> Tensor:
    return root_adjoint(*ctx.saved_tensors, slope)


def _keep_solution(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], output)
    ctx.transposed = inputs[2]


def _solve_backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
    root, solution = ctx.saved_tensors
    of_vectors = solve(root, slope, not ctx.transposed)
    pair = (solution, of_vectors) if ctx.transposed else (of_vectors, solution)
    return -outer(*pair, root.shape[-1]), of_vectors, None


def _keep_pair(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])


def _keep_factors(ctx: Any, inputs: Any, output: Tensor) -> None:
    _keep_pair(ctx, inputs, output)
    ctx.transposed = inputs[2]


def _times_backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
    root, vectors = ctx.saved_tensors
    pair = (vectors, slope) if ctx.transposed else (slope, vectors)
    return outer(*pair, root.shape[-1]), times(root, slope, not ctx.transposed), None


def _outer_backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right = ctx.saved_tensors
    return times(slope, right, False), times(slope, left, True), None  # noqa: FBT003


times.register_autograd(_times_backward, setup_context=_keep_factors)
outer.register_autograd(_outer_backward, setup_context=_keep_pair)
factorise.register_autograd(_factorise_backward, setup_context=_keep_root)
root.register_autograd(_root_backward, setup_context=_keep_both)
solve.register_autograd(_solve_backward, setup_context=_keep_solution)


def _first(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """A tensor with its batch dimension first, joined to the dimension behind."""
    moved = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return moved.flatten(0, 1)


def _batch_all(operator: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The rule by which an operator of tensors, and of numbers that stay, is batched."""

    def run(info: Any, dims: Any, *args: Any) -> tuple[Any, Any]:
        size = info.batch_size
        pairs = zip(args, dims, strict=True)
        flat = [_first(arg, dim, size) if isinstance(arg, Tensor) else arg for arg, dim in pairs]
        found = tree_map(lambda part: part.unflatten(0, (size, -1)), operator(*flat))
        return found, tree_map(lambda part: 0, found)

    return run


def _batch_vectors(operator: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """The rule for what is done to vectors: those of one root stay beside each other."""

    def run(info: Any, dims: Any, root: Tensor, vectors: Tensor, transposed: Any) -> Any:
        if dims[0] is not None:
            return _batch_all(operator)(info, dims, root, vectors, transposed)
        moved = vectors.movedim(dims[1], 1)
        result = operator(root, moved.flatten(1, 2), transposed)
        return result.unflatten(1, moved.shape[1:3]), 1

    return run


factorise.register_vmap(_batch_all(factorise))
factorise_adjoint.register_vmap(_batch_all(factorise_adjoint))
root.register_vmap(_batch_all(root))
root_adjoint.register_vmap(_batch_all(root_adjoint))
outer.register_vmap(_batch_all(outer))
solve.register_vmap(_batch_vectors(solve))
times.register_vmap(_batch_vectors(times))
