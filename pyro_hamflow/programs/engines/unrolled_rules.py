"""What operations of torch do with numbers that statements make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_hamflow.programs.engines import blocks, elements
from pyro_hamflow.programs.engines.buffers import NotSupported, kind_of
from pyro_hamflow.programs.engines.numbers import Numbers, halved, known, name_of, over
from pyro_hamflow.programs.engines.statements import Statements

_aten = torch.ops.aten
_MOVES = (
    *("select", "slice", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "stack"),
    *("cat", "split", "split_with_sizes", "unbind", "flip", "diagonal", "alias", "detach", "clone"),
    *("repeat", "tril", "triu", "roll", "select_backward", "slice_backward", "diag_embed"),
    *("diagonal_backward", "view", "_unsafe_view", "reshape", "lift_fresh_copy", "select_scatter"),
    *("slice_scatter", "contiguous", "_reshape_alias", "diagonal_scatter"),
)
_RESHAPES = ("view", "_unsafe_view", "reshape", "_reshape_alias")
_LARGE = 512  # products in a product of matrices, from which on it is a loop
_FILLED = {"zeros_like": 0, "new_zeros": 0, "ones_like": 1, "new_ones": 1}


def _floating(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.is_floating_point else torch.get_default_dtype()


def _together(*args: Any) -> torch.dtype:
    """The type of what is made of tensors and plain numbers, by their types and as torch has it."""
    empty = [
        torch.empty((1,) * part.dim(), dtype=part.dtype, device="meta")
        if isinstance(part, Tensor)
        else part
        for part in args
    ]
    return torch.result_type(*empty)


def _each(rule: elements.Rule, kind: str) -> Callable[..., Numbers]:
    """The rule for an operation on each number."""

    def apply(writer: Statements, func: Any, *args: Any, alpha: float = 1, **others: Any) -> Any:
        if any(value is not None for value in others.values()):
            raise NotSupported(name_of(func))
        dtype = _together(*args) if len(args) == 2 else args[0].dtype
        dtype = _floating(dtype) if kind == "floating" else dtype
        if alpha != 1:
            args = args[0], RULES["mul"](writer, func, args[1], alpha)
        return over(writer, rule, dtype, torch.bool if kind == "logical" else dtype, *args)

    return apply


def _reversed_difference(
    writer: Statements, func: Any, a: Numbers, b: Any, alpha: float = 1
) -> Numbers:
    return RULES["sub"](writer, func, b, a, alpha=alpha)


def _call(function: str) -> Callable[..., Numbers]:
    def apply(writer: Statements, func: Any, a: Numbers) -> Numbers:
        dtype = _floating(a.dtype)

        def one(body: Statements, dtype: torch.dtype, numbers: list[int]) -> int:
            text = f"{kind_of(dtype)}({function}({elements.operand(body, numbers[0], dtype)}))"
            return body.made(text, numbers, dtype)

        found = blocks.mapped(writer, one, dtype, dtype, [(a.ids, a.dtype)])
        if found is not None:
            return Numbers(writer, found, dtype)
        return Numbers(writer, elements.called(writer, function, a.row, dtype), dtype, a.shape)

    return apply


def _move(writer: Statements, func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that only moves numbers, or puts zeros beside them."""
    parts = [part for part in tree_leaves(args) if isinstance(part, torch.Tensor)]
    dtype = parts[0].dtype
    if any(part.dtype != dtype for part in parts) or kwargs.keys() - {"memory_format"}:
        raise NotSupported(name_of(func))

    def ids(part: Any) -> Any:
        return known(writer, part).ids if isinstance(part, torch.Tensor) else part

    moved = tree_map(ids, args)
    if name_of(func) in _RESHAPES:
        return Numbers(writer, moved[0].reshape(moved[1]), dtype)
    return tree_map(lambda made: Numbers(writer, made, dtype), func(*moved))


def _filled(writer: Statements, func: Any, a: Numbers, *args: Any, **kwargs: Any) -> Numbers:
    name = name_of(func)
    dtype = kwargs.get("dtype") or a.dtype
    number = writer.constant(_FILLED[name], dtype)
    shape = tuple(args[0] if name.startswith("new") else a.shape)
    return Numbers(writer, torch.full(shape, number, dtype=torch.int64, device="cpu"), dtype)


def _full(writer: Statements, func: Any, a: Numbers, *args: Any, **kwargs: Any) -> Numbers:
    dtype = kwargs.get("dtype") or a.dtype
    shape = tuple(args[0] if len(args) > 1 else a.shape)
    return Numbers(writer, known(writer, args[-1], dtype).ids.reshape(()).expand(shape), dtype)


def _padded(writer: Statements, func: Any, a: Numbers, pad: list[int], value: float = 0) -> Numbers:
    number = writer.constant(value, a.dtype)
    return Numbers(writer, _aten.constant_pad_nd(a.ids, pad, number), a.dtype)


def _chosen(writer: Statements, func: Any, where: Any, a: Any, b: Any) -> Numbers:
    dtype = _together(a, b)
    return over(writer, elements.chosen, dtype, dtype, where, a, b)


def _masked(writer: Statements, func: Any, a: Numbers, mask: Any, value: Any) -> Numbers:
    return over(writer, elements.chosen, a.dtype, a.dtype, mask, value, a)


def _clamped(writer: Statements, func: Any, a: Any, low: Any = None, high: Any = None) -> Any:
    for bound, name in ((low, "maximum"), (high, "minimum")):
        if bound is not None:
            a = RULES[name](writer, func, a, bound)
    return a


def _cast(writer: Statements, func: Any, a: Numbers, *, dtype: Any = None, **others: Any) -> Any:
    wanted = dtype or a.dtype
    return Numbers(writer, [elements.cast(writer, n, wanted) for n in a.row], wanted, a.shape)


def _sigmoid(writer: Statements, func: Any, a: Numbers) -> Any:
    return 1.0 / (1.0 + torch.exp(-a))


def _rows(a: Numbers, dim: Any, *, keepdim: bool) -> tuple[Tensor, list[int]]:
    """The numbers that each result is of, and the results' shape."""
    dims = list(range(a.dim())) if dim is None or dim == [] else dim
    dims = [dims] if isinstance(dims, int) else dims
    dims = sorted(d % a.dim() for d in dims) if a.dim() else []
    kept = [d for d in range(a.dim()) if d not in dims]
    if not a.numel():
        raise NotSupported("a reduction of nothing")
    rows = a.ids.permute([*kept, *dims]).reshape([*(a.shape[d] for d in kept), -1])
    shape = [1 if d in dims else n for d, n in enumerate(a.shape) if keepdim or d in kept]
    return rows.reshape(-1, rows.shape[-1]), shape


def _reduced(rule: elements.Rule, kind: str = "same") -> Callable[..., Numbers]:
    def apply(
        writer: Statements,
        func: Any,
        a: Numbers,
        dim: Any = None,
        keepdim: bool = False,  # noqa: FBT001, FBT002  # torch's order
        *,
        dtype: torch.dtype | None = None,
    ) -> Numbers:
        out = dtype or a.dtype
        if kind == "sum" and not out.is_floating_point:
            out = torch.int64
        out = torch.bool if kind == "logical" else out
        rows, shape = _rows(a, dim, keepdim=keepdim)
        if rule is elements.added and out == a.dtype:
            found = blocks.summed(writer, rows, out)
            if found is not None:
                return Numbers(writer, found.reshape(shape), out)
        cases = [[elements.cast(writer, number, out) for number in row] for row in rows.tolist()]
        return Numbers(writer, [halved(writer, rule, out, row) for row in cases], out, shape)

    return apply


def _mean(
    writer: Statements, func: Any, a: Numbers, dim: Any = None, *rest: Any, **named: Any
) -> Any:
    total = RULES["sum"](writer, func, a, dim, *rest, **named)
    return total / (a.numel() / max(1, total.numel()))


def _extreme(sign: str, combine: str) -> Callable[..., Any]:
    """The largest or smallest numbers along a dimension, and the first place of each."""

    def apply(
        writer: Statements,
        func: Any,
        a: Numbers,
        dim: int | None = None,
        keepdim: bool = False,  # noqa: FBT001, FBT002  # torch's order
    ) -> Any:
        if isinstance(dim, Tensor):
            raise NotSupported(name_of(func))
        if dim is None:
            return _reduced(elements.SAME[combine])(writer, func, a)
        rows, shape = _rows(a, dim, keepdim=keepdim)
        values, places = [], []
        for row in rows.tolist():
            best, place = row[0], writer.constant(0, torch.int64)
            for k, number in enumerate(row[1:], 1):
                x, y = (elements.operand(writer, n, a.dtype) for n in (number, best))
                text = f"({y} == {y} && ({x} {sign} {y} || {x} != {x}))"
                is_better = writer.made(text, [number, best], torch.bool)
                there = writer.constant(k, torch.int64)
                best = elements.chosen(writer, a.dtype, [is_better, number, best])
                place = elements.chosen(writer, torch.int64, [is_better, there, place])
            values.append(best)
            places.append(place)
        kinds = ((values, a.dtype), (places, torch.int64))
        return tuple(Numbers(writer, made, dtype, shape) for made, dtype in kinds)

    return apply


def _cumulative(writer: Statements, func: Any, a: Numbers, dim: int, **others: Any) -> Numbers:
    if not a.dim() or not a.numel():
        return a
    parts = list(a.unbind(dim))
    for k in range(1, len(parts)):
        parts[k] = parts[k - 1] + parts[k]
    made: Numbers = torch.stack(parts, dim)  # type: ignore[assignment]
    return made


def _product(writer: Statements, func: Any, a: Any, b: Any) -> Any:
    if a.numel() * b.shape[-1] > _LARGE:
        return NotImplemented  # it has loops of its own
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def _times_vector(writer: Statements, func: Any, a: Any, b: Any) -> Any:
    return (a * b).sum(-1)


def _each_of(rules: Any, kind: str) -> dict[str, Callable[..., Any]]:
    return {name: _each(rule, kind) for name, rule in rules.items()}


RULES: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(_MOVES, _move),
    **dict.fromkeys(_FILLED, _filled),
    **dict.fromkeys(("full_like", "new_full"), _full),
    **_each_of(elements.SAME, "same"),
    **_each_of(elements.FLOATING, "floating"),
    **_each_of(elements.LOGICAL, "logical"),
    **{name: _call(function) for name, function in elements.CALLS.items()},
    "rsub": _reversed_difference,
    "special_xlogy": _each(elements.FLOATING["xlogy"], "floating"),
    "constant_pad_nd": _padded,
    "where": _chosen,
    "masked_fill": _masked,
    "clamp": _clamped,
    "clamp_min": _clamped,
    "clamp_max": lambda writer, func, a, high: _clamped(writer, func, a, None, high),
    "_to_copy": _cast,
    "sigmoid": _sigmoid,
    "sum": _reduced(elements.added, "sum"),
    "prod": _reduced(elements.multiplied, "sum"),
    "amax": _reduced(elements.SAME["maximum"]),
    "amin": _reduced(elements.SAME["minimum"]),
    "any": _reduced(elements.LOGICAL["logical_or"], "logical"),
    "all": _reduced(elements.LOGICAL["logical_and"], "logical"),
    "mean": _mean,
    "max": _extreme(">", "maximum"),
    "min": _extreme("<", "minimum"),
    "cumsum": _cumulative,
    "mm": _product,
    "bmm": _product,
    "mv": _times_vector,
    "dot": _times_vector,
    "pyro_hamflow::product": _product,
}
