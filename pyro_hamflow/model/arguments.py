"""The arguments that a model is run with."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def signature(argument: Any) -> Any:
    """What of an argument may change a model's structure."""
    if isinstance(argument, Tensor):
        return (tuple(argument.shape), argument.dtype, argument.device)
    try:
        hash(argument)
    except TypeError:
        return id(argument)
    return argument


def same_arguments(first: Any, second: Any) -> bool:
    """Whether two sets of arguments are equal, tensors by their values."""
    if first is second:
        return True
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and first.equal(second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(
            same_arguments(first[k], second[k]) for k in first
        )
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same_arguments, first, second))
    return type(first) is type(second) and bool(first == second)
