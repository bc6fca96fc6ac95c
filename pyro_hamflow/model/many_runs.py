"""Many runs of a function that draws random numbers, made as one by ``torch.func.vmap``."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.distributions import dirichlet
from torch.overrides import TorchFunctionMode

_Found = TypeVar("_Found")
_TORCHS_DIRICHLET = dirichlet._Dirichlet

_NEW = {
    torch.empty,
    torch.empty_like,
    torch.zeros,
    torch.zeros_like,
    Tensor.new,
    Tensor.new_empty,
    Tensor.new_zeros,
}


class _Apart(TorchFunctionMode):
    """Gives each run new tensors of its own, to be filled in place with numbers of its own.

    Where the function asks whether something is so, it goes on if all runs give the same answer.

    Arguments:
        zero: Each run's own zero.
    """

    def __init__(self, zero: Tensor) -> None:
        super().__init__()
        self._zero = zero

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.__bool__:
            return _of_all(args[0])
        made = function(*args, **(kwargs or {}))
        if function in _NEW and isinstance(made, Tensor) and made.is_floating_point():
            return made + self._zero.to(made)
        return made


class _DirichletInBatches:
    """Draws of Dirichlet, beta and LKJ distributions, by the operation itself, which has batches.

    Torch draws them by a function with a gradient of its own, which has none.
    """

    @staticmethod
    def apply(concentration: Tensor) -> Tensor:
        if torch.is_grad_enabled() and concentration.requires_grad:  # of another thread
            return cast("Tensor", _TORCHS_DIRICHLET.apply(concentration))
        return torch._sample_dirichlet(concentration)


@contextmanager
def _dirichlet_in_batches() -> Iterator[None]:
    vars(dirichlet)["_Dirichlet"] = _DirichletInBatches
    try:
        yield
    finally:
        vars(dirichlet)["_Dirichlet"] = _TORCHS_DIRICHLET


def _of_all(answer: Tensor) -> bool:
    """What all runs answer."""
    while is_batchedtensor(answer):
        answer = get_unwrapped(answer)
    if bool(answer.all()):
        return True
    if bool(answer.any()):
        raise RuntimeError("runs answer in different ways, and cannot be made as one")
    return False


def many_runs(
    run: Callable[[], _Found], number: int, like: Tensor, at_once: int | None = None
) -> _Found:
    """What so many runs of a function give, first in tensors' dimensions.

    An operation that cannot be batched raises an error of torch's.

    Arguments:
        run: Draws random numbers, and gives tensors.
        number: How many runs.
        like: Of the device that it works on.
        at_once: How many at a time; all if not given.

    Example:
        >>> many_runs(lambda: torch.empty(3).cauchy_(), 1000, torch.zeros(())).unique().numel()
        3000
    """

    def apart(zero: Tensor) -> _Found:
        with _Apart(zero):
            return run()

    zeros = torch.zeros(number, dtype=like.dtype, device=like.device)
    with torch.no_grad(), warnings.catch_warnings(), _dirichlet_in_batches():
        # An operation without a batching rule is looped over: slower, and as right.
        warnings.filterwarnings("ignore", message=".*performance drop because we have not yet.*")
        batched = torch.func.vmap(apart, randomness="different", chunk_size=at_once)
        found: _Found = batched(zeros)
    return found
