"""Captured programs, shared by all that would capture the same.

A kernel, a guide's training and the correction of the guide each look at one model and its data.
The look is short, and its fingerprint tells whether the model does the same with the same data;
what takes time, the capture of its programs, is then done once. It is kept for as long as anyone
uses it, and so keeps neither models nor data alive.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.programs.storages import Storages


@dataclass(eq=False)
class Captured:
    """The programs of one model and its data, as graphs.

    Attributes:
        bases: Of one chain, by kind.
        batched: Of so many chains.
        fallible: What in them can fail, and gives NaN where it does.
    """

    bases: dict[str, GraphModule] = field(default_factory=dict)
    batched: dict[tuple[str, int], GraphModule] = field(default_factory=dict)
    fallible: set[str] = field(default_factory=set)
    _parts: dict[str, Captured] = field(default_factory=dict, repr=False)
    _copies: Storages[torch.UntypedStorage] = field(default_factory=Storages, repr=False)

    def own(self, graph: GraphModule) -> GraphModule:
        """A graph with copies of its constants, which nobody changes who writes to their data."""
        constants = torch.nn.Module()
        for name, value in graph.named_buffers(remove_duplicate=False):
            constants.register_buffer(name, self._copy_of(value))
        return GraphModule(constants, graph.graph)

    def _copy_of(self, value: Tensor) -> Tensor:
        """A view like the given one of a copy of its memory; each memory is copied once."""
        if value.layout != torch.strided or value.is_conj() or value.is_neg():
            return value.clone()
        memory = self._copies.get(value)
        if memory is None:
            memory = value.untyped_storage().clone()
            self._copies.set(value, memory)
        empty = torch.empty(0, dtype=value.dtype, device=value.device)
        return empty.set_(memory, value.storage_offset(), value.shape, value.stride())

    def part(self, name: str) -> Captured:
        """The programs of a part of the same model."""
        return self._parts.setdefault(name, Captured())

    def copy(self) -> Captured:
        """The same programs; what is added to one is not in the other."""
        return Captured(dict(self.bases), dict(self.batched), set(self.fallible))


_known: WeakKeyDictionary[object, WeakValueDictionary[str, Captured]] = WeakKeyDictionary()
_kept: WeakKeyDictionary[object, Captured] = WeakKeyDictionary()


def captured_of(model: object, key: str | None) -> Captured:
    """The programs that others have captured of a model, if it did the same then; or none yet.

    Arguments:
        model: The model.
        key: What it does with its data, by :func:`~pyro_hamflow.programs.fingerprint.
            take_fingerprint`; ``None`` if that cannot be told, and nothing is shared.
    """
    with suppress(TypeError):  # of a model that has no hash, or no weak reference
        if key is not None:
            return _known.setdefault(model, WeakValueDictionary()).setdefault(key, Captured())
    return Captured()


def keep_with(owner: object, captured: Captured) -> None:
    """Keeps programs for as long as an object lives, in place of those kept with it before."""
    _kept[owner] = captured
