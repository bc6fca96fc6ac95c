"""Factorisations of matrices, and systems that they solve, as C++."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, Writer, loops

Rule = Callable[..., None]


def _cholesky(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    *,
    upper: bool = False,
    check_errors: bool = False,
) -> None:
    if upper or check_errors:
        raise NotSupported("aten.linalg_cholesky_ex with `upper` or `check_errors`")
    factor, failed = out
    head, batch = loops(a.shape[:-2])
    numbers = (a.shape[-1], *a.strides[-2:], *factor.strides[-2:])
    places = f"{a.at(batch, last=2)}, {factor.at(batch, last=2)}"
    writer.emit(f"{head}*{failed.at(batch)} = cholesky({places}, {', '.join(map(str, numbers))});")


def _cholesky_adjoint(writer: Writer, out: Buffer, factor: Buffer, slope: Buffer) -> None:
    places = ", ".join(part.place for part in (factor, slope, out))
    numbers = ", ".join(map(str, (factor.shape[-1], *factor.strides, *slope.strides)))
    writer.emit(f"cholesky_adjoint({places}, {numbers});")


def _solve_triangular(
    writer: Writer,
    out: Buffer,
    a: Buffer,
    b: Buffer,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> None:
    head, batch = loops(out.shape[:-2])
    shape, order = out.shape[-2:], 1
    if not left:  # X a = b is a' X' = b'
        upper, shape, order = not upper, shape[::-1], -1
    matrices = [_expanded(part, out.shape[:-2]) for part in (a, b, out)]
    strides = [stride for part in matrices for stride in part.strides[-2:][::order]]
    places = ", ".join(part.at(batch, last=2) for part in matrices)
    numbers = ", ".join(map(str, (*shape, *strides)))
    flags = f"{str(upper).lower()}, {str(unitriangular).lower()}"
    writer.emit(f"{head}solve_triangular({places}, {numbers}, {flags});")


def _expanded(part: Buffer, batch: tuple[int, ...]) -> Buffer:
    """A batch of matrices, repeated where there are more of them in another."""
    shape = part.empty().expand(*batch, *part.shape[-2:])
    return Buffer(part.dtype, part.place, tuple(shape.shape), shape.stride())


def _transposed(a: Buffer) -> Buffer:
    return Buffer(
        a.dtype,
        a.place,
        (*a.shape[:-2], a.shape[-1], a.shape[-2]),
        (*a.strides[:-2], a.strides[-1], a.strides[-2]),
    )


def _lu(writer: Writer, a: Buffer, factors: Buffer, pivots: Buffer) -> None:
    head, batch = loops(a.shape[:-2])
    places = ", ".join(part.at(batch, last=2) for part in (a, factors))
    numbers = ", ".join(map(str, (a.shape[-1], *a.strides[-2:], *factors.strides[-2:])))
    writer.emit(f"{head}lu({places}, {pivots.at(batch, last=1)}, {numbers});")


def _lu_solution(
    writer: Writer,
    out: Buffer,
    factors: Buffer,
    pivots: Buffer,
    b: Buffer,
    *,
    adjoint: bool = False,
) -> None:
    head, batch = loops(out.shape[:-2])
    factors, b = (_expanded(part, out.shape[:-2]) for part in (factors, b))
    shape = pivots.empty().expand(*out.shape[:-2], pivots.shape[-1])
    pivots = Buffer(pivots.dtype, pivots.place, tuple(shape.shape), shape.stride())
    places = ", ".join(part.at(batch, last=2) for part in (factors, b, out))
    strides = [stride for part in (factors, b, out) for stride in part.strides[-2:]]
    numbers = ", ".join(map(str, (*out.shape[-2:], *strides)))
    flag = str(adjoint).lower()
    writer.emit(f"{head}lu_solve({places}, {pivots.at(batch, last=1)}, {numbers}, {flag});")


def _of_determinant(name: str) -> Rule:
    """The rule for a determinant in some form, by the factors that torch makes for it."""

    def rule(writer: Writer, out: tuple[Buffer, ...], a: Buffer) -> None:
        *values, factors, pivots = out
        # Gradients read the factors: those of the transpose, where rows lie together.
        _lu(writer, _transposed(a) if a.empty().is_contiguous() else a, factors, pivots)
        head, batch = loops(a.shape[:-2])
        places = [factors.at(batch, last=2), pivots.at(batch, last=1)]
        places += [str(a.shape[-1]), str(sum(factors.strides[-2:]))]
        places += [value.at(batch) for value in values]
        writer.emit(f"{head}{name}({', '.join(places)});")

    return rule


def _lu_factors(
    writer: Writer,
    out: tuple[Buffer, ...],
    a: Buffer,
    *,
    pivot: bool = True,
    check_errors: bool = False,
) -> None:
    if not pivot or check_errors or a.shape[-1] != a.shape[-2]:
        raise NotSupported("aten.linalg_lu_factor_ex but of plain square matrices")
    factors, pivots, failed = out
    _lu(writer, a, factors, pivots)
    _no_failure(writer, failed)


def _no_failure(writer: Writer, failed: Buffer) -> None:
    """What cannot be solved gives no numbers, and no error."""
    head, batch = loops(failed.shape)
    writer.emit(f"{head}*{failed.at(batch)} = 0;")


def _lu_solve(
    writer: Writer,
    out: Buffer,
    factors: Buffer,
    pivots: Buffer,
    b: Buffer,
    *,
    left: bool = True,
    adjoint: bool = False,
) -> None:
    if left:
        _lu_solution(writer, out, factors, pivots, b, adjoint=adjoint)
    else:  # X a = b is a' X' = b'
        turned = _transposed(out), _transposed(b)
        _lu_solution(writer, turned[0], factors, pivots, turned[1], adjoint=not adjoint)


def _solve(
    writer: Writer,
    out: tuple[Buffer, ...],
    a: Buffer,
    b: Buffer,
    *,
    left: bool = True,
    check_errors: bool = False,
) -> None:
    result, factors, pivots, failed = out
    if check_errors:
        raise NotSupported("aten._linalg_solve_ex with `check_errors`")
    if len(b.shape) == 1 or (len(b.shape) == len(a.shape) - 1 and b.shape == a.shape[:-1]):
        b, result = (
            Buffer(part.dtype, part.place, (*part.shape, 1), (*part.strides, 1))
            for part in (b, result)
        )
    _lu(writer, a, factors, pivots)
    _no_failure(writer, failed)
    _lu_solve(writer, result, factors, pivots, b, left=left)


def _inverse(
    writer: Writer, out: tuple[Buffer, Buffer], a: Buffer, *, check_errors: bool = False
) -> None:
    result, failed = out
    if check_errors:
        raise NotSupported("aten.linalg_inv_ex with `check_errors`")
    factors = writer.allocate(a.shape, a.empty().contiguous().stride(), a.dtype)
    row = a.empty()[..., 0].contiguous()
    pivots = writer.allocate(row.shape, row.stride(), torch.int32)
    _lu(writer, a, factors, pivots)
    _no_failure(writer, failed)
    head, indices = loops(a.shape)
    writer.emit(f"{head}*{result.at(indices)} = {indices[-1]} == {indices[-2]};")
    _lu_solution(writer, result, factors, pivots, result)


def _exponential(writer: Writer, out: Buffer, a: Buffer) -> None:
    size = a.shape[-1]
    room = [writer.allocate((size, size), (size, 1), a.dtype) for _ in range(3)]
    head, batch = loops(a.shape[:-2])
    names = ", ".join([a.at(batch, last=2), *(part.place for part in room)])
    numbers = ", ".join(map(str, (size, *a.strides[-2:])))
    source = room[0].at(["j0", "j1"])
    rows, columns = out.strides[-2:]
    target = f"{out.at(batch, last=2)}[j0 * {rows} + j1 * {columns}]"
    each = f"for (long j0 = 0; j0 < {size}; j0++) for (long j1 = 0; j1 < {size}; j1++) "
    writer.emit(f"{head}{{ exponential({names}, {numbers}); {each}{target} = *{source}; }}")


MATRICES: dict[str, Rule] = {
    "aten.linalg_cholesky_ex": _cholesky,
    "pyro_hamflow.cholesky_adjoint": _cholesky_adjoint,
    "aten.linalg_solve_triangular": _solve_triangular,
    "aten._linalg_slogdet": _of_determinant("log_determinant"),
    "aten._linalg_det": _of_determinant("determinant"),
    "aten.linalg_lu_factor_ex": _lu_factors,
    "aten.linalg_lu_solve": _lu_solve,
    "aten._linalg_solve_ex": _solve,
    "aten.linalg_inv_ex": _inverse,
    "aten.linalg_matrix_exp": _exponential,
}
