"""Operations that Inductor leaves to libraries, as C++."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, Writer, loops

Results = Buffer | tuple[Buffer, ...]
Rule = Callable[..., None]


def write_operation(
    writer: Writer, name: str, args: list[Any], keywords: Mapping[str, Any]
) -> Results:
    """Writes an operation into a function in C++.

    Arguments:
        writer: The function.
        name: The operation's, as ``torch.ops.aten.cumsum.default``.
        args: Its arguments: buffers in place of tensors.
        keywords: Its keyword arguments.

    Returns:
        The buffers of its results.

    Raises:
        NotSupported: If there is no code for it.
    """
    short = name.removeprefix("torch.ops.").removesuffix(".default")
    if short not in _RULES:
        raise NotSupported(short)
    target: Any = torch.ops
    for part in name.removeprefix("torch.ops.").split("."):
        target = getattr(target, part)

    def empty(value: Any) -> Any:
        return value.empty() if isinstance(value, Buffer) else value

    def made(value: Any) -> Any:
        return writer.allocate(value.shape, value.stride(), value.dtype)

    # Inductor relies on the results' shapes and strides as torch makes them.
    shapes = target(*map(empty, args), **{key: empty(value) for key, value in keywords.items()})
    results = tree_map(made, shapes)
    _RULES[short](writer, results, *args, **keywords)
    return results


def _product(writer: Writer, out: Buffer, a: Buffer, b: Buffer) -> None:
    head, batch = loops(out.shape[:-2])
    numbers = (*a.shape[-2:], b.shape[-1], *a.strides[-2:], *b.strides[-2:], *out.strides[-2:])
    places = ", ".join(part.at(batch, last=2) for part in (a, b, out))
    writer.emit(f"{head}product<{', '.join(map(str, numbers))}>({places});")


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


def _cumulative(operation: str, start: str) -> Rule:
    def rule(writer: Writer, out: Buffer, a: Buffer, dim: int = 0, **keywords: Any) -> None:
        if not a.shape:
            writer.emit(f"*{out.place} = *{a.place};")
            return
        sizes = list(a.shape)
        length, sizes[dim] = sizes[dim], 1
        head, indices = loops(sizes)
        indices[dim] = "k"
        writer.emit(
            f"{head}{{ {out.kind} x = {start}; for (long k = 0; k < {length}; k++) "
            f"{{ x {operation} *{a.at(indices)}; *{out.at(indices)} = x; }} }}"
        )

    return rule


def _sort(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    dim: int = -1,
    descending: bool = False,  # noqa: FBT001, FBT002  # torch's order
    *,
    stable: bool = False,
) -> None:
    values, places = out
    sizes = list(a.shape)
    length, sizes[dim] = sizes[dim], 1
    head, indices = loops(sizes)
    indices[dim] = "0"
    step, to = a.strides[dim], values.strides[dim]
    if places.strides[dim] != 1:
        raise NotSupported("aten.sort along strides")
    first, second = "vu" if descending else "uv"
    order = f"precedes(x[{first} * {step}], x[{second} * {step}])"
    writer.emit(
        f"{head}{{ const {a.kind}* x = {a.at(indices)}; int64_t* j = {places.at(indices)}; "
        f"for (long k = 0; k < {length}; k++) j[k] = k; std::stable_sort(j, j + {length}, "
        f"[x](int64_t u, int64_t v) {{ return {order}; }}); "
        f"for (long k = 0; k < {length}; k++) {values.at(indices)}[k * {to}] = x[j[k] * {step}]; }}"
    )


def _banded(name: str) -> Rule:
    """The rule for a loop over banded matrices, whose last tensors are its results."""

    def rule(writer: Writer, out: Results, *args: Any) -> None:
        results = (out,) if isinstance(out, Buffer) else out
        tensors = [_without_gaps(writer, arg) for arg in args if isinstance(arg, Buffer)]
        # The sizes of what they lie in, as the loops take them.
        vectors = tensors[1 if name == "solve" else 0].shape
        sizes = vectors
        if name == "solve":
            sizes = (*vectors, args[0].shape[-1], int(args[2]))
        elif name == "outer":
            sizes = (*vectors, args[2])
        numbers = [*map(str, sizes), *(tensor.place for tensor in (*tensors, *results))]
        writer.emit(f"banded::{name}({', '.join(numbers)});")

    return rule


def _without_gaps(writer: Writer, part: Buffer) -> Buffer:
    """A copy, which may be written over."""
    copy = writer.allocate(part.shape, torch.empty(part.shape, device="meta").stride(), part.dtype)
    head, indices = loops(part.shape)
    writer.emit(f"{head}*{copy.at(indices)} = *{part.at(indices)};")
    return copy


_RULES: dict[str, Rule] = {
    **{
        f"pyro_hamflow.banded_{name}": _banded(name)
        for name in ("factorise", "factorise_adjoint", "root", "root_adjoint", "solve", "outer")
    },
    "pyro_hamflow.product": _product,
    "aten.linalg_cholesky_ex": _cholesky,
    "aten.linalg_solve_triangular": _solve_triangular,
    "aten.cumsum": _cumulative("+=", "0"),
    "aten.cumprod": _cumulative("*=", "1"),
    "aten.sort": _sort,
    "aten.sort.stable": _sort,
}
