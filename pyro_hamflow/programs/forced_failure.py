"""A check of a factorisation that is made to fail, so that what a model does then is seen."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_hamflow.programs.graph_recorder import CHECK_ERRORS
from pyro_hamflow.programs.watching import watching


@watching
class FailAt(TorchDispatchMode):
    """Lets a check of a factorisation find a failure.

    Arguments:
        number: Which of the checks that come.

    Attributes:
        has_failed: Whether it has come.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.has_failed = False
        self._checks = itertools.count()

    def __torch_dispatch__(
        self, target: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if target is CHECK_ERRORS and next(self._checks) == self.number:
            self.has_failed = True
            raise torch.linalg.LinAlgError(f"{args[1]}: failed, to see what follows")
        return target(*args, **(kwargs or {}))
