"""Which of its values a running program has computed each tensor from.

A run is followed operation by operation: beside the memory of a tensor it is noted from which of
the values in question it was computed. Unlike :mod:`~pyro_hamflow.programs.connectivity`, which
tells of each number whether it has one owner, it tells of whole tensors which ones they have.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_hamflow.programs.storages import Storages
from pyro_hamflow.programs.watching import watching


@watching
class Sources(TorchDispatchMode):
    """Follows the operations within its context.

    Sets of values are integers, in which bit :math:`i` stands for value :math:`i`: a union of
    thousands takes a microsecond.

    Example:
        >>> first, second = torch.ones(2), torch.ones(2)
        >>> with Sources() as sources:
        ...     sources.mark(first, 0b01)
        ...     sources.mark(second, 0b10)
        ...     joint = first + 3.0 * second
        >>> sources.of(joint), sources.of(3.0 * second)
        (3, 0)
    """

    def __init__(self) -> None:
        super().__init__()
        self._memories: Storages[int] = Storages()

    def mark(self, tensor: Tensor, values: int) -> None:
        """Notes that a tensor's memory holds numbers of some values, and of no others."""
        self._memories.set(tensor, values)

    def of(self, tensor: Tensor) -> int:
        """The values that a tensor was computed from."""
        return self._memories.get(tensor) or 0

    def __torch_dispatch__(
        self, target: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        found = 0
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                found |= self.of(leaf)
        result = target(*args, **kwargs)
        if found:
            for leaf in tree_leaves(result):  # what is written in place is a result as well
                if isinstance(leaf, Tensor):
                    self.mark(leaf, found)
        return result
