"""How far rounding moves the results of a function, found by rounding worse.

Moving the arguments by as much tells little: where a probability is near to one, the number after
it is a large step for what comes of it, and arguments that move by a rounding do not move it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_RUNS = 8
_WORSE = 2.0  # than a rounding, in its places
_FAR = 30.0  # of results, in moves of them
_KNOWN = 1e-2  # by how much results may differ for rounding, relative to the largest


class _Worse(TorchDispatchMode):
    """Rounds what each operation gives once more, towards zero, by up to twice as much.

    Whole numbers are exact and stay: counts, and numbers at the end of their range. What is nearer
    to zero than it was is still in the range of nearly all functions.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if all(made.alias_info is None for made in func._schema.returns):
            for part in tree_leaves(result):
                if isinstance(part, Tensor) and part.is_floating_point() and _is_all_there(part):
                    self._round(part)
        return result

    def _round(self, part: Tensor) -> None:
        noise = torch.rand(part.shape, generator=self._generator).to(part.device)
        worse = part * (1.0 - _WORSE * torch.finfo(part.dtype).eps * noise.to(torch.float64))
        part.copy_(torch.where(part == part.round(), part, worse.to(part.dtype)))


def _is_all_there(part: Tensor) -> bool:
    """Whether each number has a place of its own in memory."""
    return part.layout == torch.strided and not any(
        stride == 0 and size > 1 for stride, size in zip(part.stride(), part.shape, strict=True)
    )


def moves_by_rounding(function: Callable[[], Any]) -> Iterator[list[Tensor]]:
    """By how much each number of a function's results moves where operations round worse.

    Arguments:
        function: Runs operations of torch and returns tensors.

    Yields:
        Of each tensor the largest move of its numbers in one run, in two, and so on; infinite where
        one run gave a number and another none. What they explain, more runs explain.
    """
    right = tree_leaves(function())
    moves = [torch.zeros_like(part, dtype=torch.float64) for part in right]
    for run in range(_RUNS):
        with _Worse(run):
            made = tree_leaves(function())
        pairs = zip(moves, made, right, strict=True)
        moves = [torch.maximum(move, _gaps(a, b)) for move, a, b in pairs]
        yield moves


def _gaps(one: Tensor, other: Tensor) -> Tensor:
    """How far apart numbers are: infinitely where one of them is none, unless both are."""
    gap = (one.double() - other.double()).abs().nan_to_num(nan=torch.inf)
    return torch.where((one == other) | (one.isnan() & other.isnan()), 0.0, gap)


def same_but_for_rounding(
    one: Sequence[Tensor], other: Sequence[Tensor], moves: Sequence[Tensor], tolerance: float
) -> bool:
    """Whether results are as near to each other as rounding lets them be, number by number.

    Arguments:
        one: Results.
        other: Results of another function, which may be the same.
        moves: By how much rounding moves either, by :func:`moves_by_rounding`. However far that
            is, or unknown, results are apart by no more than little of the largest beside them.
        tolerance: How near results are in any case, relative to each number.
    """
    for a, b, move in zip(one, other, moves, strict=True):
        size = b.double().abs().nan_to_num(nan=0.0, posinf=0.0)
        largest = size.max() if size.numel() else 0.0
        lost = (_FAR * move).clamp(max=_KNOWN * (1.0 + largest))
        if bool((_gaps(a, b) > tolerance * (1.0 + size) + lost).any()):
            return False
    return True
