"""Numbers at places that data tell, among numbers that statements make."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.engines import elements
from pyro_hamflow.programs.engines.buffers import NotSupported, kind_of
from pyro_hamflow.programs.engines.numbers import Numbers, known, over
from pyro_hamflow.programs.engines.statements import Statements


def _at_least_zero(size: int) -> elements.Rule:
    """A place, counted from the end if it is negative."""

    def rule(writer: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
        name = elements.operand(writer, numbers[0], dtype)
        return writer.made(f"({name} < 0 ? {name} + {size} : {name})", numbers, dtype)

    return rule


def _places(writer: Statements, indices: list[Any], sizes: list[int]) -> Numbers:
    """Where in a row the numbers are that indices in several dimensions tell."""
    whole = [known(writer, index) for index in indices]
    if any(index.dtype != torch.int64 for index in whole):
        raise NotSupported("places that are no whole numbers")
    place: Any = None
    for index, size in zip(whole, sizes, strict=True):
        own = over(writer, _at_least_zero(size), torch.int64, torch.int64, index)
        place = own if place is None else place * size + own
    found: Numbers = place
    return found


def _front(a: Tensor, indices: list[Any]) -> tuple[list[int], list[int], list[Any]]:
    """Which dimensions are indexed, which not, and by what."""
    found = [d for d, index in enumerate(indices) if index is not None]
    if found != list(range(found[0], found[0] + len(found))):
        raise NotSupported("indices in dimensions that lie apart")
    rest = [d for d in range(a.dim()) if d not in found]
    return found, rest, [indices[d] for d in found]


def index(writer: Statements, func: Any, a: Any, indices: list[Any]) -> Numbers:
    """Numbers at indices, in some dimensions."""
    a = known(writer, a)
    dims, rest, given = _front(a, indices)
    place = _places(writer, given, [a.shape[d] for d in dims])
    rows = a.ids.permute([*dims, *rest]).reshape(-1, *[a.shape[d] for d in rest])
    width = math.prod(rows.shape[1:])
    buffer, step = writer.copied(rows.reshape(-1).tolist(), a.dtype)
    made = [
        _read(writer, buffer.place, at, width, k, a.dtype, step)
        for at in place.row
        for k in range(width)
    ]
    whole = torch.tensor(made, dtype=torch.int64, device="cpu")
    whole = whole.reshape(*place.shape, *rows.shape[1:])
    # The indices' dimensions lie where those were that they index.
    own = list(range(place.dim()))
    whole = whole.movedim(own, [dims[0] + i for i in own])
    return Numbers(writer, whole, a.dtype)


def _read(
    writer: Statements, place: str, at: int, width: int, k: int, dtype: torch.dtype, step: int
) -> int:
    where = f"{elements.operand(writer, at, torch.int64)} * {width} + {k}"
    return writer.made(f"{place}[{where}]", [at], dtype, step)


def index_put(
    writer: Statements,
    func: Any,
    a: Any,
    indices: list[Any],
    values: Any,
    accumulate: bool = False,  # noqa: FBT001, FBT002  # torch's order
) -> Numbers:
    """Writes numbers to indices, or adds them."""
    a = known(writer, a)
    dims, rest, given = _front(a, indices)
    place = _places(writer, given, [a.shape[d] for d in dims])
    own, before, after = list(range(place.dim())), a.shape[: dims[0]], a.shape[dims[-1] + 1 :]
    wide = known(writer, values, a.dtype).ids.expand(*before, *place.shape, *after)
    row = wide.movedim([dims[0] + i for i in own], own).reshape(-1).tolist()
    width = math.prod((*before, *after))
    places = [(at, width, k) for at in place.row for k in range(width)]
    order = [*dims, *rest]
    front = Numbers(writer, a.ids.permute(order), a.dtype)
    made = _written(writer, front, places, row, add=accumulate)
    back = [order.index(d) for d in range(a.dim())]
    return Numbers(writer, made.ids.permute(back), a.dtype)


def _written(
    writer: Statements,
    a: Numbers,
    places: list[tuple[int, int, int]],
    values: list[int],
    *,
    add: bool,
) -> Numbers:
    buffer, first = writer.stored(a.row, a.dtype)
    sign, kind = "+=" if add else "=", kind_of(a.dtype)
    lines, needs = [], []
    for (at, width, k), value in zip(places, values, strict=True):
        where = f"{elements.operand(writer, at, torch.int64)} * {width} + {k}"
        lines.append(f"{buffer.place}[{where}] {sign} {kind}({writer.name(value)});")
        needs += [at, value]
    step = writer.step(needs, lines, [first])
    made = [writer.read(f"{buffer.place}[{k}]", a.dtype, step) for k in range(a.numel())]
    return Numbers(writer, made, a.dtype, a.shape)


def _along(a: Numbers, dim: int, places: Numbers) -> list[tuple[int, int, int]]:
    """Where numbers are whose place along a dimension is told, and whose others are their own."""
    dim %= a.dim()
    strides = a.ids.stride()
    offsets = torch.zeros(places.shape, dtype=torch.int64, device="cpu")
    for d, size in enumerate(places.shape):
        if d != dim:
            along = torch.arange(size, device="cpu") * strides[d]
            offsets += along.reshape([-1 if i == d else 1 for i in range(places.dim())])
    rows = zip(places.row, offsets.reshape(-1).tolist(), strict=True)
    return [(at, strides[dim], offset) for at, offset in rows]


def gather(writer: Statements, func: Any, a: Any, dim: int, places: Any, **others: Any) -> Numbers:
    """Numbers at places along a dimension."""
    a, places = known(writer, a), known(writer, places)
    if not a.dim():
        raise NotSupported("aten.gather of a number")
    buffer, step = writer.copied(a.row, a.dtype)
    found = _along(a, dim, places)
    made = [_read(writer, buffer.place, at, w, k, a.dtype, step) for at, w, k in found]
    return Numbers(writer, made, a.dtype, places.shape)


def scatter_add(
    writer: Statements, func: Any, a: Any, dim: int, places: Any, values: Any
) -> Numbers:
    """Adds numbers at places along a dimension."""
    a, places, values = known(writer, a), known(writer, places), known(writer, values)
    if not a.dim() or places.shape != values.shape:
        raise NotSupported("aten.scatter_add of these shapes")
    return _written(writer, a, _along(a, dim, places), values.row, add=True)


def scatter(writer: Statements, func: Any, a: Any, dim: int, places: Any, value: Any) -> Numbers:
    """Writes numbers, or one, at places along a dimension."""
    a, places, values = known(writer, a), known(writer, places), known(writer, value, a.dtype)
    if not a.dim() or values.dim() and places.shape != values.shape:
        raise NotSupported("aten.scatter of these shapes")
    row = values.ids.expand(places.shape).reshape(-1).tolist()
    return _written(writer, a, _along(a, dim, places), row, add=False)


PICKS = {
    "index": index,
    "index_put": index_put,
    "gather": gather,
    "scatter_add": scatter_add,
    "scatter": scatter,
}
