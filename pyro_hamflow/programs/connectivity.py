"""Which elements of its inputs each entry of a function's results is computed from.

A plate says that its elements are independent; whether they are, the model's operations tell. A run
of the model is followed operation by operation. Beside the memory of every tensor that is computed
from the inputs in question lies a second one of the same size, which holds for each number the
*owner* that it was computed from: one element, none, or several. Values never matter: where a
likelihood is flat, it depends on its inputs all the same. What the model does with the values of
constants (its data) is followed exactly, indexing by them above all; an operation without a rule
counts as mixing everything that it is given.

Owners are integers: :data:`NONE`, :data:`SEVERAL`, or the number of an element, counted from one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_hamflow.programs.owner_rules import owners_of
from pyro_hamflow.programs.owners import NONE, SEVERAL, Call, fold
from pyro_hamflow.programs.storages import Storages, apart, storage_key
from pyro_hamflow.programs.watching import watching


class ValueReadError(RuntimeError):
    """Python asks for the value, or a shape that follows the values, of a tensor with owners.

    Arguments:
        operation: The name of the operation by which it asks.
    """

    def __init__(self, operation: str) -> None:
        super().__init__(operation)
        self.operation = operation.partition("\n")[0]  # Pyro adds its trace to what is raised


class Owners(NamedTuple):
    """The owners of one result.

    Attributes:
        of: An integer tensor of the result's shape.
        mixer: The name of the operation in which several elements first met, if any did.
    """

    of: Tensor
    mixer: str | None


def trace_owners(
    function: Callable[[dict[str, Tensor]], Mapping[str, Any]],
    values: Mapping[str, Tensor],
    owners: Mapping[str, Tensor],
) -> dict[str, Owners]:
    """Runs a function and finds the owners of its results.

    Arguments:
        function: A function from named tensors to named results.
        values: What to run it with.
        owners: The owners of some of its arguments, integer tensors that broadcast to their shapes;
            those of all others are :data:`NONE`.

    Returns:
        The owners of each result that is a tensor.

    Raises:
        ValueReadError: If control flow, or the shape of a result, follows the values of an argument
            that has owners: what the results depend on cannot be told from one run.

    Example:
        >>> x = torch.tensor([0.3, -1.0, 2.0])
        >>> follow = lambda v: {"own": v["x"].relu() * 2, "gaps": v["x"][1:] - v["x"][:-1]}
        >>> found = trace_owners(follow, {"x": x}, {"x": torch.tensor([1, 2, 3])})
        >>> found["own"].of, found["gaps"].of, found["gaps"].mixer
        (tensor([1, 2, 3]), tensor([-1, -1]), 'sub')
    """
    with apart():
        copies = {name: value.detach().clone() for name, value in values.items()}
        follower = _Follower()
        for name, owner in owners.items():
            follower.write(copies[name], owner, None)
        with follower:
            results = dict(function(copies))
        return {
            name: Owners(follower.owner(result).clone(), follower.mixer(result))
            for name, result in results.items()
            if isinstance(result, Tensor)
        }


class _Memory(NamedTuple):
    """The owners of the numbers in one piece of memory.

    Attributes:
        owners: One for each number.
        width: How many bytes a number has.
        mixer: The operation in which several elements first met.
    """

    owners: Tensor
    width: int
    mixer: str | None


@watching
class _Follower(TorchDispatchMode):
    """Finds the owners of all that operations compute, as they come."""

    def __init__(self) -> None:
        super().__init__()
        self._memories: Storages[_Memory] = Storages()

    def owner(self, tensor: Tensor) -> Tensor:
        """The owners of a tensor's entries, of its shape; zeros if its memory has none."""
        memory = self._memories.get(tensor)
        if memory is None:
            return torch.zeros((), dtype=torch.long, device=tensor.device).expand(tensor.shape)
        if memory.width != tensor.element_size():  # complex numbers seen as pairs of real ones
            memory = self._claim(tensor, fold(memory.owners), memory.mixer)
        return memory.owners.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def mixer(self, tensor: Tensor) -> str | None:
        memory = self._memories.get(tensor)
        return None if memory is None else memory.mixer

    def has_owners(self, tensor: Tensor) -> bool:
        memory = self._memories.get(tensor)
        return memory is not None and bool(self.owner(tensor).any())

    def write(self, tensor: Tensor, owner: Tensor, mixer: str | None) -> None:
        """Notes the owners of a tensor's entries."""
        memory = self._memories.get(tensor)
        if memory is None and not bool(owner.any()):
            return
        if tensor.layout != torch.strided:
            raise ValueReadError(f"{mixer} (a sparse result)" if mixer else "a sparse result")
        if memory is None:
            memory = self._claim(tensor, owner.new_zeros(()), mixer)
        elif memory.mixer is None and mixer is not None:
            self._memories.set(tensor, memory._replace(mixer=mixer))
        self.owner(tensor).copy_(owner)

    def _claim(self, tensor: Tensor, owner: Tensor, mixer: str | None) -> _Memory:
        width = tensor.element_size()
        count = tensor.untyped_storage().nbytes() // width
        memory = _Memory(owner.to(tensor.device).expand(count).clone(), width, mixer)
        self._memories.set(tensor, memory)
        return memory

    def __torch_dispatch__(
        self, target: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        owned = [tensor for tensor in inputs if self._memories.get(tensor) is not None]
        if not owned:
            return target(*args, **kwargs)
        call = Call(target, args, kwargs, self)
        if call.reads_values():
            raise ValueReadError(call.name)
        # Found before it runs: what it writes to may be what it reads.
        written = call.written()
        found = owners_of(call, written)
        result = target(*args, **kwargs)
        known = {storage_key(tensor) for tensor in inputs}  # what is there already is a view of it
        made = [
            t for t in tree_leaves(result) if isinstance(t, Tensor) and storage_key(t) not in known
        ]
        found += owners_of(call, made)
        for output, owner in zip(written + made, found, strict=True):
            self.write(output, owner, self._blame(owner, owned, call.name))
        return result

    def _blame(self, owner: Tensor, owned: list[Tensor], name: str) -> str | None:
        """The operation in which several elements first met, if they have."""
        if not bool((owner == SEVERAL).any()):
            return None
        for tensor in owned:
            if (mixer := self.mixer(tensor)) is not None:
                return mixer
        return name


__all__ = ["NONE", "SEVERAL", "Owners", "ValueReadError", "trace_owners"]
