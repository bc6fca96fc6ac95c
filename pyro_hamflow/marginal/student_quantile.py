r"""The distribution function of Student's t, and its quantiles at normal noise, with derivatives.

With :math:`\nu` degrees of freedom, :math:`y = \nu / (\nu + x^2)` and
:math:`a = \nu / 2`, what lies above a positive x is

.. math:: \frac{1}{2 B(a, 1/2)} \int_0^y s^{a - 1} (1 - s)^{-1/2} ds
    = \frac{y^a}{2 a B(a, 1/2)} \int_0^\infty e^{-r} (1 - y e^{-r / a})^{-1/2} dr,

for Gauss and Laguerre where :math:`y^a` is small. Elsewhere
:math:`x = \sqrt{\nu} \tan\varphi` makes the part between the centre and x an integral of
:math:`\cos^{\nu - 1} \varphi`, for Gauss and Legendre. Tails have eight digits from one degree of
freedom on, and ten from two. The normal score of x is nearly
proportional to :math:`w = \sqrt{-\log y}`, for all degrees of freedom, so that Newton's method in w
ends in few steps.

References:
    | Bounds on Normal Approximations to Student's and the Chi-Square Distributions (Wallace, 1959)
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.marginal.tail_score import log_normal_density, tail_score, with_slopes

_DEPTH = 4.0  # of -a log y, from which on the tail's integral is taken
_FAR = 2.64  # of -log y, the same for few degrees of freedom
_STEPS = 2  # of Newton by the rough rule, which has four digits, before one by the fine one
_FURTHEST = 1300.0  # of -log y, where x is still a number
_WIDTH = 3e-5  # of differences in the degrees of freedom, as a share of them


class _Rule(NamedTuple):
    """Places and weights of two quadratures.

    Attributes:
        near: Of Gauss and Legendre, between -1 and 1.
        far: Of Gauss and Laguerre.
    """

    near: tuple[Tensor, Tensor]
    far: tuple[Tensor, Tensor]


def _rule(near: int, far: int) -> _Rule:
    legendre, laguerre = np.polynomial.legendre.leggauss(near), np.polynomial.laguerre.laggauss(far)
    return _Rule(
        (torch.tensor(legendre[0]), torch.tensor(legendre[1])),
        (torch.tensor(laguerre[0]), torch.tensor(laguerre[1])),
    )


_ROUGH, _FINE = _rule(6, 6), _rule(12, 20)


def student_quantile(df: Tensor, u: Tensor) -> Tensor:
    """The quantile at the level of normal noise, of the standard Student's t distribution.

    Arguments:
        df: The degrees of freedom, positive.
        u: Standard normal noise.

    Returns:
        The quantile, of the shape that both broadcast to and the type of the noise. First
        derivatives in both are right, and so is the second one in the noise.
    """
    df, u = torch.broadcast_tensors(df, u)
    nu, noise = df.detach().double(), u.detach().double()
    x = solve(nu, noise)
    width = _WIDTH * nu
    grown = _smaller_tail(nu + width, x) - _smaller_tail(nu - width, x)
    return with_slopes(x, u, df, partial(log_density, nu), -x.sign() * grown / (2 * width))


def log_tails(df: Tensor, x: Tensor, rule: _Rule = _FINE) -> tuple[Tensor, Tensor]:
    """The logarithms of the distribution function and of what lies above, in double precision.

    Arguments:
        df: The degrees of freedom, positive.
        x: Values of the standard distribution.
        rule: Where the integrals are evaluated.
    """
    (nodes, weights), (depths, masses) = ((n.to(df.device), w.to(df.device)) for n, w in rule)
    df, x = torch.broadcast_tensors(df.double(), x.double())
    half = 0.5 * df
    log_y = -torch.log1p(x.square() / df)
    is_far = -log_y * half > torch.minimum(_DEPTH * torch.ones_like(half), _FAR * half)
    log_beta = torch.lgamma(half) - torch.lgamma(half + 0.5) + 0.5 * math.log(math.pi)

    far_y = torch.where(is_far, log_y, -1.0)[..., None]
    rest = -torch.expm1(far_y - depths / half[..., None])
    integral = (rest.rsqrt() * masses).sum(-1)
    far = half * far_y[..., 0] - (2 * half).log() - log_beta + integral.log()

    angle = torch.atan(torch.where(is_far, 0.0, x) / df.sqrt())[..., None]
    cosines = torch.cos(0.5 * angle * (1 + nodes))
    powers = cosines.log() * (df - 1)[..., None]
    near = 0.5 * angle[..., 0] * (powers.exp() * weights).sum(-1)
    near = near * torch.exp(-log_beta)  # between the centre and x

    other = torch.log1p(-far.exp())
    lower = torch.where(is_far, torch.where(x < 0, far, other), torch.log(0.5 + near))
    upper = torch.where(is_far, torch.where(x < 0, other, far), torch.log(0.5 - near))
    return lower, upper


def log_density(df: Tensor, x: Tensor) -> Tensor:
    """The log density of the standard distribution."""
    constant = torch.lgamma(0.5 * df + 0.5) - torch.lgamma(0.5 * df)
    return constant - 0.5 * (math.pi * df).log() - 0.5 * (df + 1) * torch.log1p(x.square() / df)


def solve(df: Tensor, u: Tensor) -> Tensor:
    """The quantile alone, of arguments of equal shapes in double precision."""
    noise = u.abs()
    w = noise * (8 * df + 3) / (8 * df + 1) / df.sqrt()
    log_constant = torch.lgamma(0.5 * df + 0.5) - torch.lgamma(0.5 * df) - 0.5 * math.log(math.pi)
    for rule in (_ROUGH,) * _STEPS + (_FINE,):
        w = w.clamp(1e-12, math.sqrt(_FURTHEST))
        stretch = torch.expm1(w.square()).sqrt()
        z = tail_score(log_tails(df, df.sqrt() * stretch, rule)[1].clamp(max=-math.log(2.0)))
        log_slope = log_constant - 0.5 * (df - 1) * w.square() + (w / stretch).log()
        w = w - (z - noise) * torch.exp(log_normal_density(z) - log_slope)
    w = w.clamp(0.0, math.sqrt(_FURTHEST))
    return u.sign() * df.sqrt() * torch.expm1(w.square()).sqrt()


def _smaller_tail(df: Tensor, x: Tensor) -> Tensor:
    return log_tails(df, x.abs())[1].exp()
