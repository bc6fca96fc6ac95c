"""What is known of tensors by the memory that they live in.

Views share the memory of what they view, and writing in place changes it for all of them. So
whoever follows the tensors of a running program keeps what is known by memory, not by tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from pyro_hamflow.programs.watching import as_written

Known = TypeVar("Known")

_SWEEP = 256  # new memories after which those that are gone are forgotten


class Storages(Generic[Known]):
    """A dictionary by the memory of tensors, which keeps none of them alive."""

    def __init__(self) -> None:
        # While a weak reference is held, no other memory gets its number.
        self._known: dict[int, tuple[StorageWeakRef, Known]] = {}
        self._new = 0

    def get(self, tensor: Tensor) -> Known | None:
        """What is known of a tensor's memory."""
        entry = self._known.get(storage_key(tensor))
        return None if entry is None else entry[1]

    def set(self, tensor: Tensor, known: Known) -> None:
        """Notes something of a tensor's memory, in place of what was known; nothing if sparse."""
        if tensor.layout != torch.strided:
            return
        self._known[storage_key(tensor)] = (StorageWeakRef(tensor.untyped_storage()), known)
        self._new += 1
        if self._new >= _SWEEP:
            self._new = 0
            gone = [key for key, (reference, _) in self._known.items() if reference.expired()]
            for key in gone:
                del self._known[key]


def storage_key(tensor: Tensor) -> int:
    """A key of a tensor's memory, unique while that is in use; 0 for sparse tensors."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else 0


@contextmanager
def apart() -> Iterator[None]:
    """Runs programs as if nobody else were recording, batching or differentiating them."""
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch.enable_grad(),
        as_written(),
    ):
        yield
