"""Watching the operations of programs, apart from torch's compiler.

What a model has compiled for itself would hide its operations. But the compiler takes as long to
import as all the rest of a short run, and is there only if something has been compiled.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Mode = TypeVar("Mode", bound=TorchDispatchMode)

_COMPILER = "torch._dynamo"


def as_written() -> AbstractContextManager[None]:
    """Runs what a model has compiled for itself as it was written.

    What it compiles for the first time within, torch runs so by itself where somebody watches.
    """
    if _COMPILER not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def watching(mode: type[Mode]) -> type[Mode]:
    """A mode as it is written, until the compiler is there: then as torch hides it from that."""
    hidden = mode.__torch_dispatch__
    written = inspect.unwrap(hidden)

    def dispatch(
        self: Mode, target: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        watch = hidden if _COMPILER in sys.modules else written
        return watch(self, target, types, args, kwargs)

    mode.__torch_dispatch__ = dispatch  # type: ignore[method-assign, assignment]
    return mode
