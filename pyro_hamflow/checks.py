"""What arguments have to be: checked before anything runs, with what was given and expected."""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn

_UNSYMMETRIC = 1e-5  # of the largest entry


def number(name: str, value: Any) -> float:
    """A real number, neither a truth value nor NaN.

    Arguments:
        name: Of the argument.
        value: What was given for it.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is NaN.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point():
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{name}` is {value!r}: expected a number")
    if math.isnan(value):
        raise ValueError(f"`{name}` is {value}: expected a number")
    return float(value)


def positive(name: str, value: Any, *, infinite: bool = False) -> float:
    """A number above zero, finite unless it may be infinite.

    Example:
        >>> positive("step_size", -1.0)
        Traceback (most recent call last):
        ValueError: `step_size` is -1.0: expected a positive number
    """
    result = number(name, value)
    if not result > 0.0 or (math.isinf(result) and not infinite):
        raise ValueError(f"`{name}` is {value}: expected a positive number")
    return result


def between(name: str, value: Any, low: float, high: float, *, ends: str) -> float:
    """A number from ``low`` to ``high``; of the two, those in ``ends`` belong to it.

    Arguments:
        name: Of the argument.
        value: What was given for it.
        low: The lower bound.
        high: The upper bound.
        ends: ``"both"``, ``"low"`` or ``"none"``.
    """
    result = number(name, value)
    above = result >= low if ends in ("both", "low") else result > low
    below = result <= high if ends == "both" else result < high
    if not (above and below):
        left, right = "<=" if ends in ("both", "low") else "<", "<=" if ends == "both" else "<"
        raise ValueError(f"`{name}` is {value}: expected {low:g} {left} {name} {right} {high:g}")
    return result


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """An integer from ``least`` on, to ``most`` if there is one."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{name}` is {value!r}: expected an integer")
    result = int(value)
    if result < least or (most is not None and result > most):
        expected = f"{least} or more" if most is None else f"{least} to {most}"
        raise ValueError(f"`{name}` is {value}: expected {expected}")
    return result


def flag(name: str, value: Any) -> bool:
    """A truth value."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}: expected True or False")
    return value


def positive_definite(name: str, value: Any) -> Tensor:
    """A symmetric positive definite matrix, or the positive diagonal of one.

    Raises:
        TypeError: If it is no tensor of real numbers.
        ValueError: If it is of another shape, not finite, not symmetric or not positive definite.
    """
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise TypeError(f"`{name}` is {value!r}: expected a tensor of real numbers")
    if value.dim() not in (1, 2) or (value.dim() == 2 and value.shape[0] != value.shape[1]):
        raise ValueError(
            f"`{name}` has shape {tuple(value.shape)}: expected (dimension,) or (dimension, "
            "dimension)"
        )
    if not bool(value.isfinite().all()):
        raise ValueError(f"`{name}` is not finite: expected finite numbers")
    if value.dim() == 1:
        if not bool((value > 0.0).all()):
            raise ValueError(f"`{name}` has {float(value.min())} in it: expected positive numbers")
        return value
    if not bool((value.diag() > 0.0).all()):
        low = float(value.diag().min())
        raise ValueError(f"`{name}` has {low} on its diagonal: expected positive numbers")
    root = value.diag().sqrt()
    scaled = (value / torch.outer(root, root)).double()
    if float((scaled - scaled.mT).abs().max()) > _UNSYMMETRIC:
        raise ValueError(f"`{name}` is not symmetric: expected a covariance matrix")
    if int(torch.linalg.cholesky_ex(scaled).info):
        raise ValueError(f"`{name}` is not positive definite: expected a covariance matrix")
    return value


def fills(name: str, value: object, protocol: type) -> None:
    """Refuses what lacks methods of a protocol.

    Arguments:
        name: Of the argument.
        value: What was given for it.
        protocol: Whose methods are called.

    Raises:
        TypeError: If any is missing.
    """
    parts = [vars(part) for part in reversed(protocol.__mro__)]
    wanted = dict.fromkeys(method for part in parts for method in part if method[0] != "_")
    lacking = [f"`{method}`" for method in wanted if not callable(getattr(value, method, None))]
    if lacking:
        raise TypeError(
            f"`{name}` is a {type(value).__name__}: expected a {protocol.__name__}, whose methods "
            f"{', '.join(lacking)} it lacks"
        )


def finite(name: str, network: nn.Module) -> None:
    """Refuses a network that has lost its numbers.

    Raises:
        ValueError: If any of its weights or constants is not finite.
    """
    for part, value in network.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(f"`{name}` has '{part}' that is not finite: expected finite weights")
