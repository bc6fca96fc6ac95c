"""Tensors of which it is known by what statements each number is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from pyro_hamflow.programs.engines import blocks
from pyro_hamflow.programs.engines.elements import Rule
from pyro_hamflow.programs.engines.statements import Statements

Apply = Callable[[Statements, Any, Any, Any], Any]


class Numbers(Tensor):
    """A tensor of numbers that statements make.

    Attributes:
        writer: The statements.
        ids: Which number is where.
        apply: What an operation on it does.
    """

    writer: Statements
    ids: Tensor
    apply: Apply

    @staticmethod
    def __new__(
        cls: type[Numbers],
        writer: Statements,
        ids: Tensor | list[int],
        dtype: torch.dtype,
        shape: Any = None,
    ) -> Numbers:
        if isinstance(ids, list):
            ids = torch.tensor(ids, dtype=torch.int64, device="cpu").reshape(tuple(shape))
        make: Any = Tensor._make_wrapper_subclass
        made: Numbers = make(cls, ids.shape, dtype=dtype, device="cpu")
        made.writer, made.ids = writer, ids.contiguous()
        return made

    @property
    def row(self) -> list[int]:
        """All numbers in a row."""
        found: list[int] = self.ids.reshape(-1).tolist()
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        writer = next(part.writer for part in leaves if isinstance(part, Numbers))
        return Numbers.apply(writer, func, args, kwargs or {})


def name_of(func: Any) -> str:
    """The name of an operation of torch's, as the dispatcher has it or as users do."""
    schema = getattr(func, "_schema", None)
    name: str = func.__name__ if schema is None else schema.name.removeprefix("aten::")
    return name


def known(writer: Statements, part: Any, dtype: torch.dtype | None = None) -> Numbers:
    """A tensor or a plain number as one whose numbers are known."""
    if isinstance(part, Numbers):
        return part
    if not isinstance(part, Tensor):
        part = torch.tensor(part, dtype=dtype, device="cpu")
    ids = [writer.constant(value, part.dtype) for value in part.reshape(-1).tolist()]
    return Numbers(writer, ids, part.dtype, part.shape)


def over(
    writer: Statements, rule: Rule, dtype: torch.dtype, out: torch.dtype, *args: Any
) -> Numbers:
    """A rule for numbers, applied to tensors that are made as large as each other."""
    wholes = [known(writer, arg, dtype) for arg in args]
    parts = torch.broadcast_tensors(*(whole.ids for whole in wholes))
    kinds = [whole.dtype for whole in wholes]
    found = blocks.mapped(writer, rule, dtype, out, list(zip(parts, kinds, strict=True)))
    if found is not None:
        return Numbers(writer, found, out)
    rows = zip(*(part.reshape(-1).tolist() for part in parts), strict=True)
    return Numbers(writer, [rule(writer, dtype, list(row)) for row in rows], out, parts[0].shape)


def halved(writer: Statements, rule: Rule, dtype: torch.dtype, row: Sequence[int]) -> int:
    """All numbers of a row together, by halves: sums are more right so, and faster."""
    row = list(row)
    while len(row) > 1:
        pairs = [row[i : i + 2] for i in range(0, len(row), 2)]
        row = [rule(writer, dtype, pair) if len(pair) > 1 else pair[0] for pair in pairs]
    return row[0]
