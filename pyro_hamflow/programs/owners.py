"""Owners of tensors' entries: how they join, and the operations that they are asked about.

An *owner* is an integer: the number of the element, counted from one, that an entry was computed
from; :data:`NONE` if from none, :data:`SEVERAL` if from more than one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

NONE, SEVERAL = 0, -1
_NOBODY = torch.iinfo(torch.long).max  # above all owners
# Operations whose results take no more than a shape, and a number that is given, from arguments.
NEW_TENSORS = frozenset(
    (
        "empty_like full_like new_empty new_empty_strided new_full new_ones new_zeros ones_like "
        "zeros_like"
    ).split()
)


class Follower(Protocol):
    """Who knows the owners of tensors."""

    def owner(self, tensor: Tensor) -> Tensor:
        """The owners of a tensor's entries."""

    def has_owners(self, tensor: Tensor) -> bool:
        """Whether any entry has an owner."""


class Call:
    """An operation with its arguments by name.

    Arguments:
        target: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        follower: Who knows their owners.
    """

    def __init__(
        self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], follower: Follower
    ) -> None:
        self.target = target
        self.follower = follower
        self.arguments = {}
        names = [argument.name for argument in target._schema.arguments]
        for argument in target._schema.arguments:
            if argument.has_default_value():
                self.arguments[argument.name] = argument.default_value
        self.arguments |= dict(zip(names, args, strict=False)) | kwargs
        devices = [tensor.device for tensor in self.tensors()]
        beside = [
            device for device in devices if device.type != "cpu"
        ]  # may read the CPU's scalars
        self._device = (beside or devices or [torch.device("cpu")])[0]

    @property
    def name(self) -> str:
        """The operation's name, without the underscore of those that write."""
        return str(self.target._overloadpacket.__name__).rstrip("_") or "operation"

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    def tensors(self) -> list[Tensor]:
        """All arguments that are tensors."""
        leaves = tree_leaves(list(self.arguments.values()))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def written(self) -> list[Tensor]:
        """The arguments that the operation writes to."""
        arguments = self.target._schema.arguments
        written = [self[a.name] for a in arguments if a.alias_info and a.alias_info.is_write]
        return [leaf for leaf in tree_leaves(written) if isinstance(leaf, Tensor)]

    def owner(self, value: Any) -> Tensor:
        """The owners of an argument, where the operation runs; :data:`NONE` if it is no tensor."""
        if isinstance(value, Tensor):
            return self.follower.owner(value).to(self._device)
        return torch.zeros((), dtype=torch.long, device=self._device)

    def is_constant(self, value: Any) -> bool:
        """Whether an argument has no owner."""
        return not isinstance(value, Tensor) or not self.follower.has_owners(value)

    def reads_values(self) -> bool:
        """Whether Python gets to see a value that has owners, or a shape that follows values."""
        if torch.Tag.data_dependent_output in self.target.tags or self.name == "is_nonzero":
            return not all(map(self.is_constant, self.tensors()))
        if self.name in ("index", "masked_select"):
            chosen = [self["mask"], *(self["indices"] or ())]
            masks = [c for c in chosen if isinstance(c, Tensor) and c.dtype == torch.bool]
            return not all(map(self.is_constant, masks))
        if self.name == "repeat_interleave":
            return not self.is_constant(self["repeats"])
        if torch.Tag.dynamic_output_shape in self.target.tags:
            return not all(map(self.is_constant, self.tensors()))
        return False


def join(owners: Sequence[Tensor]) -> Tensor:
    """The owners of what is computed entry by entry."""
    joined, *others = owners
    for other in others:
        both = torch.where(other == NONE, joined, torch.where(joined == NONE, other, SEVERAL))
        joined = torch.where(joined == other, joined, both)
    return joined


def fold(owner: Tensor, dims: Sequence[int] | None = None, *, keepdim: bool = False) -> Tensor:
    """The owners of what is computed from all entries along some dimensions, or from all."""
    dims = list(range(owner.dim())) if dims is None else list(dims)
    if not dims:
        return owner
    if owner.numel() == 0:
        return owner.new_zeros(owner.shape).sum(dims, keepdim)
    highest = owner.amax(dims, keepdim)
    lowest = torch.where(owner == NONE, _NOBODY, owner).amin(dims, keepdim)
    one = torch.where(lowest == highest, highest, SEVERAL)
    return torch.where(lowest == _NOBODY, NONE, one)


def mix(call: Call, outputs: list[Tensor]) -> list[Tensor]:
    """The rule of operations that are not known: every result depends on every argument."""
    everything = join([fold(call.owner(tensor)) for tensor in call.tensors()])
    return [everything.expand(output.shape) for output in outputs]
