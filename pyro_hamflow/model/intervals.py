"""Intervals, some ends of which may be infinite, and how the real line is mapped there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to, constraints
from torch.nn.functional import softplus
from torch.utils._python_dispatch import _disable_current_modes


class UnboundedInterval(Transform):
    """Numbers between two ends, each of which may be infinite, another one for each element.

    Between finite ends stands torch's map by a sigmoid, above one finite end or below it torch's
    by an exponential, and the real line stays as it is.

    Arguments:
        support: The interval; its ends broadcast to the values.

    Example:
        >>> ends = torch.tensor([-torch.inf, 1.0]), torch.tensor([torch.inf, torch.inf])
        >>> UnboundedInterval(constraints.interval(*ends))(torch.zeros(2))
        tensor([0., 2.])
    """

    domain = constraints.real
    bijective = True

    def __init__(self, support: Any) -> None:
        super().__init__()
        self.codomain = support
        self._bounds = (support.lower_bound, support.upper_bound)

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both ends, zero where infinite, and where they are finite."""
        lower, upper = (torch.as_tensor(bound).to(like) for bound in self._bounds)
        above, below = lower.isfinite(), upper.isfinite()
        return torch.where(above, lower, 0.0), torch.where(below, upper, 0.0), above, below

    # An exponential or a logarithm that an element has no use for is taken of a harmless number,
    # lest an infinite slope there make NaN of the element's own.

    def _call(self, x: Tensor) -> Tensor:
        lower, upper, above, below = self._ends(x)
        away = torch.where(above ^ below, x, 0.0).exp()
        tiny, eps = torch.finfo(x.dtype).tiny, torch.finfo(x.dtype).eps
        share = x.sigmoid().clamp(min=tiny, max=1.0 - eps)
        one_sided = torch.where(above, lower + away, upper - away)
        one_sided = torch.where(above | below, one_sided, x)
        return torch.where(above & below, lower + (upper - lower) * share, one_sided)

    def _inverse(self, y: Tensor) -> Tensor:
        lower, upper, above, below = self._ends(y)
        away = torch.where(above ^ below, torch.where(above, y - lower, upper - y), 1.0)
        one_sided = torch.where(above | below, away.log(), y)
        share = torch.where(above & below, (y - lower) / (upper - lower), 0.5)
        tiny, eps = torch.finfo(y.dtype).tiny, torch.finfo(y.dtype).eps
        share = share.clamp(min=tiny, max=1.0 - eps)
        return torch.where(above & below, share.log() - (-share).log1p(), one_sided)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        lower, upper, above, below = self._ends(x)
        width = torch.where(above & below, upper - lower, 1.0)
        between = width.log() - softplus(-x) - softplus(x)
        one_sided = torch.where(above ^ below, x, 0.0)
        return torch.where(above & below, between, one_sided)


def map_onto(support: Any) -> Any:
    """The map from the real line to a support: torch's, but to intervals with infinite ends.

    Of those torch's makes infinite values; Pyro's ``GeneralizedPareto`` has such a support.

    Raises:
        NotImplementedError: If none is registered.

    Example:
        >>> map_onto(constraints.interval(1.0, torch.inf))(torch.tensor(0.0))
        tensor(2.)
    """
    if isinstance(support, constraints.independent):
        base = map_onto(support.base_constraint)
        return IndependentTransform(base, support.reinterpreted_batch_ndims)
    if isinstance(support, constraints.interval | constraints.half_open_interval):
        if not (_is_finite(support.lower_bound) and _is_finite(support.upper_bound)):
            return UnboundedInterval(support)
    return biject_to(support)


def _is_finite(bound: Any) -> bool:
    """Whether an end is known to be finite, in all elements."""
    try:
        with _disable_current_modes():  # recorded or not
            return bool(torch.as_tensor(bound).isfinite().all())
    except RuntimeError:  # one for each chain or particle
        return False
