"""The floating-point type of a distribution's draws."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

import torch
import torch.distributions as torch_dist
from pyro.distributions import TorchDistribution
from torch import Tensor


def float_type(fn: TorchDistribution, default: torch.dtype) -> torch.dtype:
    """The floating-point type of a distribution's draws, by promotion of its arguments'.

    Arguments:
        fn: The distribution.
        default: The type of one without such arguments.
    """
    found = [part.dtype for part in floats(fn)]
    return reduce(torch.promote_types, found) if found else default


def example_of(values: Sequence[Tensor]) -> Tensor:
    """A zero of the type that can hold all values, on the device of the first."""
    first = values[0] if values else torch.zeros(())
    dtype = reduce(torch.promote_types, (value.dtype for value in values), first.dtype)
    return torch.zeros((), dtype=dtype, device=first.device)


def floats(fn: TorchDistribution) -> list[Tensor]:
    """The floating-point tensors that a distribution is made of."""
    found: list[Tensor] = []
    seen: list[Any] = []  # a transform and its inverse hold each other

    def visit(part: Any) -> None:
        if isinstance(part, Tensor) and part.is_floating_point():
            found.append(part)
        elif isinstance(part, (torch_dist.Distribution, torch_dist.Transform)):
            if any(part is other for other in seen):
                return
            seen.append(part)
            for value in vars(part).values():
                visit(value)
        elif isinstance(part, list | tuple):
            for value in part:
                visit(value)

    visit(fn)
    return found
