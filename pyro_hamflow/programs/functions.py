"""Functions of torch in other words, where batching would make something slow of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pyro_hamflow.programs.large_factors import cholesky
from pyro_hamflow.programs.triangular import cholesky_solve, linalg_solve_triangular

_STRAIGHT = 40.0  # log(1 + exp(x)) - x is less than rounding of x in double precision


class InOtherWords(TorchFunctionMode):
    """Runs functions that ``vmap`` takes apart into many operations as a few that it keeps."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = NotImplemented
        if func in _WORDS:
            result = _WORDS[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


def _cross_entropy_of_logits(
    logits: Tensor, target: Tensor, *, reduction: str = "mean", **others: Any
) -> Any:
    """That of Bernoulli variables: torch's own formula, with one operation for the logarithm.

    Under ``vmap`` torch takes two exponentials, a logarithm and a selection, which with their
    gradient take three times as long. Beyond the threshold the logarithm is the logit's own number.
    """
    if reduction != "none" or any(other is not None for other in others.values()):
        return NotImplemented
    return (1.0 - target) * logits + functional.softplus(-logits, threshold=_STRAIGHT)


_WORDS: dict[Any, Callable[..., Any]] = {
    functional.binary_cross_entropy_with_logits: _cross_entropy_of_logits,
    torch.linalg.cholesky: cholesky,
    torch.linalg.solve_triangular: linalg_solve_triangular,
    torch.cholesky_solve: cholesky_solve,
    Tensor.cholesky_solve: cholesky_solve,
}
