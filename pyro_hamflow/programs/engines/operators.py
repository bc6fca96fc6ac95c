"""Operations that Inductor leaves to libraries, as C++."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.utils._pytree import tree_map

from pyro_hamflow.programs.banded_source import LOOPS
from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, Writer, loops
from pyro_hamflow.programs.engines.matrices import MATRICES, Rule

Results = Buffer | tuple[Buffer, ...]


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


def _along(a: Buffer, dim: int, index: str = "k") -> tuple[str, list[str], int]:
    """Loops over all dimensions but one, the indices there, and the length of that dimension.

    Arguments:
        a: What is gone through.
        dim: The dimension that is left out.
        index: Its index.
    """
    sizes = list(a.shape)
    length, sizes[dim] = sizes[dim], 1
    head, indices = loops(sizes)
    indices[dim] = index
    return head, indices, length


def _cumulative(operation: str, start: str) -> Rule:
    def rule(writer: Writer, out: Buffer, a: Buffer, dim: int = 0, **keywords: Any) -> None:
        if not a.shape:
            writer.emit(f"*{out.place} = *{a.place};")
            return
        head, indices, length = _along(a, dim)
        writer.emit(
            f"{head}{{ {out.kind} x = {start}; for (long k = 0; k < {length}; k++) "
            f"{{ x {operation} *{a.at(indices)}; *{out.at(indices)} = x; }} }}"
        )

    return rule


def _running(operation: str) -> Rule:
    """The largest or smallest number so far and its place, the latest; NaN from the first on."""

    def rule(writer: Writer, out: tuple[Buffer, Buffer], a: Buffer, dim: int) -> None:
        values, places = out
        if not a.shape:
            writer.emit(f"*{values.place} = *{a.place}; *{places.place} = 0;")
            return
        head, indices, length = _along(a, dim, "0")
        first, indices[dim] = a.at(indices), "k"
        writer.emit(
            f"{head}{{ {a.kind} x = *{first}; int64_t j = 0; for (long k = 0; k < {length}; k++) "
            f"{{ const {a.kind} y = *{a.at(indices)}; "
            f"if (y != y || (x == x && y {operation} x)) x = y, j = k; "
            f"*{values.at(indices)} = x; *{places.at(indices)} = j; }} }}"
        )

    return rule


def _log_sums(writer: Writer, out: Buffer, a: Buffer, dim: int) -> None:
    if not a.shape:
        writer.emit(f"*{out.place} = *{a.place};")
        return
    head, indices, length = _along(a, dim)
    writer.emit(
        f"{head}{{ {a.kind} x = -INFINITY; for (long k = 0; k < {length}; k++) "
        f"{{ x = log_sum(x, *{a.at(indices)}); *{out.at(indices)} = x; }} }}"
    )


def _ordered(writer: Writer, a: Buffer, dim: int, *, descending: bool) -> tuple[Buffer, Buffer]:
    """A tensor sorted along a dimension, and where its numbers were."""
    strides = torch.empty(a.shape, device="meta").movedim(dim, -1).contiguous()
    shape = strides.movedim(-1, dim)
    made = [writer.allocate(a.shape, shape.stride(), kind) for kind in (a.dtype, torch.int64)]
    _sort(writer, (made[0], made[1]), a, dim, descending)
    return made[0], made[1]


def _one_of_each(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    dim: int,
    number: int,
    *,
    kept: bool,
    gaps_count: bool,
) -> None:
    """Of the numbers along a dimension, in order, the one of a place, and where it was.

    With ``gaps_count`` it is NaN where one of them is.
    """
    if not a.shape:
        raise NotSupported("a place in the order of a number")
    dim %= len(a.shape)
    ordered = _ordered(writer, a, dim, descending=False)
    head, indices = loops([1 if i == dim else size for i, size in enumerate(a.shape)])
    there, last = list(indices), list(indices)
    there[dim], last[dim] = "k", str(a.shape[dim] - 1)
    here = indices if kept else [*indices[:dim], *indices[dim + 1 :]]
    greatest = ordered[0].at(last)
    place = f"*{greatest} != *{greatest} ? {last[dim]} : {number}" if gaps_count else str(number)
    moves = "".join(
        f"*{to.at(here)} = *{source.at(there)}; " for to, source in zip(out, ordered, strict=True)
    )
    writer.emit(f"{head}{{ const long k = {place}; {moves}}}")


def _median(writer: Writer, out: Buffer, a: Buffer) -> None:
    count = math.prod(a.shape)
    if not count:
        writer.emit(f"*{out.place} = NAN;")
        return
    row = Buffer(a.dtype, _without_gaps(writer, a).place, (count,), (1,))
    place = writer.allocate((), (), torch.int64)
    middle = (count - 1) // 2
    _one_of_each(writer, (out, place), row, 0, middle, kept=False, gaps_count=True)


def _median_along(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    dim: int,
    keepdim: bool = False,  # noqa: FBT001, FBT002  # torch's order
) -> None:
    middle = (a.shape[dim] - 1) // 2 if a.shape else 0
    _one_of_each(writer, out, a, dim, middle, kept=keepdim, gaps_count=True)


def _kth(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    k: int,
    dim: int = -1,
    keepdim: bool = False,  # noqa: FBT001, FBT002  # torch's order
) -> None:
    _one_of_each(writer, out, a, dim, k - 1, kept=keepdim, gaps_count=False)


def _top(
    writer: Writer,
    out: tuple[Buffer, Buffer],
    a: Buffer,
    k: int,
    dim: int = -1,
    largest: bool = True,  # noqa: FBT001, FBT002  # torch's order
    sorted: bool = True,  # noqa: A002, FBT001, FBT002
) -> None:
    if not a.shape:
        raise NotSupported("aten.topk of a number")
    ordered = _ordered(writer, a, dim % len(a.shape), descending=largest)
    head, indices = loops(out[0].shape)
    for to, source in zip(out, ordered, strict=True):
        writer.emit(f"{head}*{to.at(indices)} = *{source.at(indices)};")


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
    head, indices, length = _along(a, dim, "0")
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
        of_vectors = name in ("solve", "times")
        vectors = tensors[int(of_vectors)].shape
        sizes = vectors
        if of_vectors:
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
    **{f"pyro_hamflow.banded_{name}": _banded(name) for name in LOOPS},
    **MATRICES,
    "pyro_hamflow.product": _product,
    "aten.cumsum": _cumulative("+=", "0"),
    "aten.cumprod": _cumulative("*=", "1"),
    "aten.cummax": _running(">="),
    "aten.cummin": _running("<="),
    "aten.logcumsumexp": _log_sums,
    "aten.median": _median,
    "aten.median.dim": _median_along,
    "aten.kthvalue": _kth,
    "aten.topk": _top,
    "aten.sort": _sort,
    "aten.sort.stable": _sort,
}
