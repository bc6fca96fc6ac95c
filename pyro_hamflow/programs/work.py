"""How much work a function is, by what it computes and not by a clock, so that runs repeat."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Counting(TorchDispatchMode):
    """Counts the numbers that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        if not func.is_view:
            made = (part for part in tree_leaves(results) if isinstance(part, Tensor))
            self.count += sum(part.numel() for part in made)
        return results


def numbers_made(run: Callable[[], Any]) -> int:
    """How many numbers all operations of a function make, views apart.

    Example:
        >>> numbers_made(lambda: torch.ones(5)[None] + 1.0)
        10
    """
    with _Counting() as counting:
        run()
    return counting.count
