r"""The quantile function of the gamma distribution, at normal noise, with its derivatives.

With shape a and noise u, x solves :math:`F_a(x) = \Phi(u)`. Below the median, and wherever x is
small, :math:`\log F_a` is nearly linear in :math:`\log x`; above, the logarithm of the upper tail
is nearly so in x. Newton's method, with Halley's correction, needs few steps there. It is kept
between bounds that hold for every shape and shrink from step to step,

.. math:: (\Phi(u)\, \Gamma(a + 1))^{1/a} \le x \le a + \sqrt{2 a t} + t, \quad
    t = -\log \Phi(-u).

References:
    | Adaptive Estimation of a Quadratic Functional by Model Selection (Laurent and Massart, 2000)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hamflow.marginal.tail_score import DEEP, log_normal_density, tail_score, with_slopes

# Of shapes from .001 to 1e6 and noise to 30, all are found to rounding with two or three.
_STEPS = 3
_SMALL = 0.5  # below, x is found by the lower tail on either side of the median
_LOWEST, _HIGHEST = -690.0, 690.0  # log x, which has to be a number itself
_RANGE = 1e-300, 1e8  # of values whose scores are told apart
_ROUNDING = 1e-9  # of the bounds, by which they are set apart
_WIDTH = 3e-5  # of differences in the shape, in standard deviations


def gamma_quantile(shape: Tensor, u: Tensor) -> Tensor:
    """The quantile at the level of normal noise, of the standard gamma distribution.

    Arguments:
        shape: Its shape, positive.
        u: Standard normal noise.

    Returns:
        The quantile, of the shape that both broadcast to and the type of the noise. First
        derivatives in both are right, and so is the second one in the noise.
    """
    shape, u = torch.broadcast_tensors(shape, u)
    a, noise = shape.detach().double(), u.detach().double()
    log_gamma = a.lgamma()
    x = solve(a, noise, log_gamma)
    return with_slopes(x, u, shape, lambda x: _log_density(a, x, log_gamma), cdf_slope(a, x))


def gamma_score(shape: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`gamma_quantile`.

    Arguments:
        shape: The shape, positive.
        x: Values, positive.

    Returns:
        The normal score of each value. First derivatives in both are right, and second ones but
        that in the shape alone.
    """
    dtype = x.dtype
    shape, x = torch.broadcast_tensors(shape.double(), x.double().clamp(*_RANGE))
    a, value = shape.detach(), x.detach()
    upper = value > a
    log_gamma = a.lgamma()
    log_tail, is_deep = _log_tail(a, value, upper, log_gamma)
    z = tail_score(log_tail)
    z = torch.where(upper, z, -z)
    log_normal = log_normal_density(z)
    slope = _score_slope(a, value, z, log_gamma)
    # Of a tail that is no number its logarithm has a slope, less that of Gamma(a + 1) below.
    change = value.log() - torch.where(upper, a, a + 1).digamma()
    deep_slope = torch.where(upper, -change, change) * torch.exp(log_tail - log_normal)
    near_slope = cdf_slope(a, value) * torch.exp(-torch.where(is_deep, 0.0, log_normal))
    moved_x = x - value
    moved_shape = torch.where(is_deep, deep_slope, near_slope) * (shape - a)
    # Nothing in value and first derivatives; the second derivatives are those of the slope.
    bend = 0.5 * (_score_slope(a, x, z + slope * moved_x, log_gamma) - slope)
    bend = bend + (_score_slope(shape, value, z + moved_shape, shape.lgamma()) - slope)
    return (z + (slope + bend) * moved_x + moved_shape).to(dtype)


def _score_slope(shape: Tensor, x: Tensor, z: Tensor, log_gamma: Tensor) -> Tensor:
    """The derivative of the score z in the value."""
    log_slope = _log_density(shape, x, log_gamma) - log_normal_density(z)
    return torch.exp(log_slope.clamp(max=_HIGHEST))


def _log_density(shape: Tensor, x: Tensor, log_gamma: Tensor) -> Tensor:
    return (shape - 1) * x.log() - x - log_gamma


def solve(shape: Tensor, u: Tensor, log_gamma: Tensor) -> Tensor:
    """The quantile alone, of arguments of equal shapes in double precision.

    Arguments:
        shape: The shape.
        u: The noise.
        log_gamma: The logarithm of the gamma function at the shape.
    """
    half = math.sqrt(0.5) * u
    p, q = 0.5 * torch.special.erfc(-half), 0.5 * torch.special.erfc(half)
    log_q, log_p = q.log(), torch.where(u > 0, torch.log1p(-q), p.log())
    log_next = log_gamma + shape.log()  # of the gamma function at the shape plus one
    low = ((log_p + log_next) / shape).clamp(_LOWEST, _HIGHEST).exp()
    high = shape + (-2 * shape * log_q).sqrt() - log_q
    high = torch.maximum(high, low)
    x = torch.minimum(torch.maximum(_start(shape, u, log_p, log_next), low), high)
    low, high = low * (1 - _ROUNDING), high * (1 + _ROUNDING)
    upper = (u > 0) & (x > _SMALL)
    target = torch.where(upper, log_q, log_p)
    for _ in range(_STEPS):
        log_tail = _tail(shape, x, upper).log()
        gap = log_tail - target
        is_low = (gap < 0) ^ upper
        low, high = torch.where(is_low, x, low), torch.where(is_low, high, x)
        # The derivative in x above, in log x below, and half of the second over the first.
        log_density = _log_density(shape, x, log_gamma)
        hazard = (log_density - log_tail).exp()
        above = -hazard, 0.5 * ((shape - 1) / x - 1 + hazard)
        below = x * hazard, 0.5 * (shape - x - x * hazard)
        step = -gap / torch.where(upper, above[0], below[0])
        step = step / (1 + step * torch.where(upper, above[1], below[1])).clamp(0.5, 2.0)
        new = torch.where(upper, x + step, x * step.clamp(-50.0, 50.0).exp())
        inside = (new >= low) & (new <= high)
        x = torch.where(inside, new, low.sqrt() * high.sqrt())
    return x


def _start(shape: Tensor, u: Tensor, log_p: Tensor, log_next: Tensor) -> Tensor:
    """A rough quantile: the cube of a normal variable, and for shapes below one a power."""
    cube = shape * (1 - 1 / (9 * shape) + u / (3 * shape.sqrt())).clamp(min=0.0).pow(3)
    # The power of an exponential variable's distribution function has the right lower tail.
    tail = -torch.special.expm1((log_p / shape).clamp(max=-1e-300))
    power = -tail.log() * (log_next / shape).exp()
    return torch.where(shape < 1, power, cube)


def _tail(shape: Tensor, x: Tensor, upper: Tensor) -> Tensor:
    """The distribution function, or where it is asked for the other tail.

    At zero either function costs nothing.
    """
    zero = torch.zeros_like(x)
    below = torch.special.gammainc(shape, torch.where(upper, zero, x))
    above = torch.special.gammaincc(shape, torch.where(upper, x, zero))
    return torch.where(upper, above, below)


def _log_tail(shape: Tensor, x: Tensor, upper: Tensor, log_gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithm of :func:`_tail`, and where that is too small a number to be taken itself."""
    tail = _tail(shape, x, upper)
    log_density = _log_density(shape, x, log_gamma)
    above = log_density - torch.log1p((1 - shape) / x)  # first terms of an expansion for large x
    below = log_density + x.log() - shape.log()
    is_deep = tail < math.exp(DEEP)
    return torch.where(is_deep, torch.where(upper, above, below), tail.log()), is_deep


def cdf_slope(shape: Tensor, x: Tensor) -> Tensor:
    """The derivative of the gamma distribution function in the shape, by differences.

    They are good to eight digits in each tail; torch's own derivative has three, and cannot be
    batched.
    """
    upper = x > shape  # far out, differences of the other tail have no digits left
    width = _WIDTH * shape / (1 + shape).sqrt()
    change = _tail(shape + width, x, upper) - _tail(shape - width, x, upper)
    return torch.where(upper, -change, change) / (2 * width)
