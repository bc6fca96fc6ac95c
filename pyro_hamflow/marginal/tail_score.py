r"""Normal scores by the logarithms of tails, which serve at any depth.

The score of a value x is the z with :math:`\Phi(z) = F(x)`. Where a prior has become narrow, a
value at which its coordinate is held may lie hundreds of its scales out, where :math:`1 - F(x)` is
no number any more. Its logarithm is one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

DEEP = -600.0  # the logarithm of a tail, from where on the tail is next to no number itself
_DEEPEST = -1e8  # from where on depths are not told apart, and squares of scores have all digits
_STEPS = 3  # of Newton, from an expansion that is good to a tenth there


def log_normal_density(z: Tensor) -> Tensor:
    """The logarithm of the standard normal density."""
    return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)


def log_tail(z: Tensor) -> Tensor:
    """The logarithm of the standard normal distribution's upper tail, of z not negative."""
    half = math.sqrt(0.5) * z
    return torch.log(0.5 * torch.special.erfcx(half)) - half.square()


def tail_score(level: Tensor) -> Tensor:
    r"""The z with :math:`\log \Phi(-z)` as given, without derivatives.

    Arguments:
        level: The logarithm of the smaller tail, in double precision; at most log(1/2).

    Example:
        >>> tail_score(torch.tensor([-3.7832, -1000.0], dtype=torch.double))
        tensor([ 2.0000, 44.6157], dtype=torch.float64)
    """
    level = level.detach()
    near = -torch.special.ndtri(level.clamp(min=DEEP).exp())
    twice = -2 * level.clamp(max=DEEP)
    z = (twice - (2 * math.pi * twice).log()).sqrt()
    for _ in range(_STEPS):
        gap = log_tail(z)
        z = z + (gap - level) * torch.exp(gap - log_normal_density(z))
    return torch.where(level > DEEP, near, z)


def score_of_tails(log_lower: Tensor, log_upper: Tensor) -> Tensor:
    """The normal score of a value by the logarithms of both its tails, with two derivatives."""
    upper = log_upper < log_lower
    smaller = torch.where(upper, log_upper, log_lower).double().clamp(min=_DEEPEST)
    level = smaller.detach()
    z, moved = tail_score(level), smaller - level
    slope = _slope(level, z)
    # Nothing in value and first derivative; the second derivative is that of the slope.
    bend = 0.5 * (_slope(smaller, z + slope * moved) - slope)
    z = z + (slope + bend) * moved
    return torch.where(upper, z, -z).to(log_lower.dtype)


def with_slopes(
    x: Tensor,
    u: Tensor,
    parameter: Tensor,
    log_density: Callable[[Tensor], Tensor],
    cdf_slope: Tensor,
) -> Tensor:
    """A quantile that was found without derivatives, with those of an implicit function.

    Arguments:
        x: The quantile, in double precision.
        u: The standard normal noise that it is the quantile of.
        parameter: The distribution's.
        log_density: The distribution's, for the parameter's value.
        cdf_slope: The derivative of its distribution function at x in the parameter.

    Returns:
        The quantile, of the type of the noise. First derivatives in noise and parameter are right,
        and so is the second one in the noise.
    """
    noise = u.detach().double()
    moved_u, moved = u.double() - noise, parameter.double() - parameter.detach().double()

    def slope_at(u: Tensor, x: Tensor) -> Tensor:
        return torch.exp(log_normal_density(u) - log_density(x))

    slope = slope_at(noise, x)
    first = x + slope * moved_u - cdf_slope * torch.exp(-log_density(x)) * moved
    # Nothing in value and first derivative; the second derivative is that of the slope.
    bend = 0.5 * (slope_at(u.double(), first) - slope) * moved_u
    return (first + bend).to(u.dtype)


def _slope(level: Tensor, z: Tensor) -> Tensor:
    """The derivative of the score in the logarithm of its tail."""
    return -torch.exp(level - log_normal_density(z))
