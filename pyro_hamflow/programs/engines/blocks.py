"""Operations on many numbers among statements on single ones: loops in memory.

Graphs of a few hundred operations are written number by number. Where some of their tensors are
vectors or matrices, a loop takes one line in place of one for each number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.programs.engines import elements
from pyro_hamflow.programs.engines.buffers import Buffer, NotSupported, kind_of, loops
from pyro_hamflow.programs.engines.regions import ZERO
from pyro_hamflow.programs.engines.shared_loops import joined_dimensions
from pyro_hamflow.programs.engines.statements import Statements

# Numbers from which on a loop is written. From 12 or fewer on, models of states of three numbers
# took up to twice as long; from 24 or 48 on, none was faster, and some took g++ thrice as long.
_LEAST = 16
_MOST = 2**14  # beyond which a loop for each operation is slow: all of them should be one
_SPARSE = 0.25  # of the numbers zero, from which on single ones are better: most are left out


def is_block(ids: Tensor) -> bool:
    """Whether a tensor's numbers are many, different, and hardly any is known to be zero."""
    if ids.numel() < _LEAST or float((ids == ZERO).double().mean()) > _SPARSE:
        return False
    if len(ids.unique()) < _LEAST:
        return False
    if ids.numel() > _MOST:
        raise NotSupported("tensors of so many numbers, in so many operations")
    return True


def in_memory(writer: Statements, ids: Tensor, dtype: torch.dtype) -> tuple[Buffer, int | None]:
    """Where numbers lie: as they are if they do so evenly, else a copy of them.

    Returns:
        A buffer of the tensor's shape, and the step that makes it, if one does.
    """
    found = writer.where(ids)
    if found is not None:
        return found
    small = ids  # what is repeated along a dimension is copied once
    for dim in range(ids.dim()):
        if bool((small == small.narrow(dim, 0, 1)).all()):
            small = small.narrow(dim, 0, 1)
    if not small.dim():
        small = small[None]
    # Rows go along the dimension in which most numbers lie behind each other: those are copied
    # together, as each of the vectors that are columns of a matrix is.
    inner = max(range(small.dim()), key=lambda dim: (int((small.diff(dim=dim) == 1).sum()), dim))
    rows = small.movedim(inner, -1).contiguous()
    buffer, step = writer.copied(rows.reshape(-1).tolist(), dtype)
    places = torch.empty(rows.shape, device="meta").movedim(-1, inner)
    strides = zip(small.shape, places.stride(), strict=True)
    steps = tuple(0 if size == 1 else stride for size, stride in strides)[: ids.dim()]
    return Buffer(dtype, buffer.place, tuple(ids.shape), steps), step


def mapped(
    writer: Statements,
    rule: elements.Rule,
    dtype: torch.dtype,
    out: torch.dtype,
    parts: Sequence[tuple[Tensor, torch.dtype]],
) -> Tensor | None:
    """A rule for numbers applied to many in a loop; nothing where single statements are better.

    Arguments:
        writer: The statements.
        rule: The rule.
        dtype: The type in which it works.
        out: The type of its results.
        parts: Numbers of one shape, and their types.
    """
    if writer.sides:
        return None
    is_same = [bool((ids == ids.reshape(-1)[0]).all()) if ids.numel() else True for ids, _ in parts]
    moving = [ids for (ids, _), same in zip(parts, is_same, strict=True) if not same]
    if not moving or not all(map(is_block, moving)):
        return None
    made = writer.allocate(moving[0].shape, _row_by_row(moving[0].shape), out)
    needs, after, given = list[int](), list[int](), list[tuple[str, str]]()
    read: list[Buffer | int] = []
    for (ids, kind), same in zip(parts, is_same, strict=True):
        if same:
            read.append(int(ids.reshape(-1)[0]))
            continue
        buffer, step = in_memory(writer, ids, kind)
        after += [] if step is None else [step]
        read.append(buffer)
    buffers = [part for part in read if isinstance(part, Buffer)]
    strides = [part.strides for part in (made, *buffers)]
    shape, (own, *steps) = joined_dimensions(made.shape, *strides)
    (head, indices), body, numbers = loops(shape), Statements(10**6), list[int]()
    constants: dict[str, torch.dtype] = {}
    for part in read:
        name = f"x{len(given)}"
        if isinstance(part, Buffer):
            given.append((f"const {part.kind}*", part.place))
            there = Buffer(part.dtype, name, shape, steps.pop(0))
            numbers.append(body.read(f"*{there.at(indices)}", part.dtype))
        elif (known := writer.numbers[part]).is_constant:
            numbers.append(ZERO if part == ZERO else body.given(known))
            if part != ZERO and known.dtype.is_floating_point:
                constants[known.text] = known.dtype
        else:
            given.append((f"const {kind_of(known.dtype)}", writer.name(part)))
            needs.append(part)
            numbers.append(body.read(name, known.dtype))
    result = elements.operand(body, rule(body, dtype, numbers), out)
    turn = " ".join([*body.lines(), f"*{Buffer(out, 'y', shape, own).at(indices)} = {result};"])
    for text, kind in constants.items():  # seen by the rule; loops shall not differ in them
        turn = turn.replace(text, f"x{len(given)}")
        given.append((f"const {kind_of(kind)}", text))
    call = writer.shared.call(made, given, f"{head}{{ {turn} }}")
    return written(writer, made, writer.step(needs, [call], after))


def summed(writer: Statements, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Sums of numbers along the last dimension, in a loop."""
    if writer.sides or not dtype.is_floating_point:
        return None
    if rows.numel() < _LEAST or not is_block(rows):
        return None
    buffer, before = in_memory(writer, rows, dtype)
    if buffer.dtype != dtype:
        return None
    made = writer.allocate(rows.shape[:-1], _row_by_row(rows.shape[:-1]), dtype)
    (head, indices), kind = loops(made.shape), kind_of(dtype)
    there = Buffer(dtype, "x0", buffer.shape, buffer.strides).at([*indices, "k"])
    to = Buffer(dtype, "y", made.shape, made.strides).at(indices)
    loop = f"for (long k = 0; k < {rows.shape[-1]}; k++) s += *{there};"
    body = f"{head}{{ {kind} s = 0; {loop} *{to} = s; }}"
    call = writer.shared.call(made, [(f"const {kind}*", buffer.place)], body)
    step = writer.step([], [call], [] if before is None else [before])
    return written(writer, made, step)


def _row_by_row(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor without gaps."""
    return torch.empty(tuple(shape), device="meta").stride()


def written(writer: Statements, part: Buffer, step: int) -> Tensor:
    """The numbers of a buffer that a step has written."""
    places = torch.zeros(part.shape, dtype=torch.int64, device="cpu")
    for dim, (size, stride) in enumerate(zip(part.shape, part.strides, strict=True)):
        shape: list[Any] = [-1 if d == dim else 1 for d in range(len(part.shape))]
        places += (torch.arange(size, device="cpu") * stride).reshape(shape)
    ids = writer.region(part.place, part.dtype, places.reshape(-1).tolist(), step)
    return torch.tensor(ids, dtype=torch.int64, device="cpu").reshape(part.shape)
