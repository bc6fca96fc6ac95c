r"""Distributions written as smooth transforms of standard normal noise.

A likelihood estimate is a smooth function of parameters and noise only if its particles are:
:math:`x = g_\theta(u)` with :math:`u \sim N(0, I)`. Location-scale families and transformed normals
are such maps already; beta, Dirichlet and multivariate Student variables become so through gamma
variables; any other univariate distribution through the inverse of its distribution function
:math:`F_\theta`, whose derivative follows from the implicit function theorem,
:math:`\partial x / \partial\theta = -F_\theta'(x) / f_\theta(x)`, and needs no derivative of the
search.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
import torch.distributions as torch_dist
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import AbsTransform

from pyro_hamflow.marginal.gamma_quantile import gamma_quantile
from pyro_hamflow.marginal.student_quantile import student_quantile

_BISECTIONS = 24  # of 330: what is left, 2e-5, each step of Newton squares
_MARGIN = 10.0  # between logarithms of the smallest numbers and of those that are taken for right
_NEWTON_STEPS = 4  # two from there to rounding, two in reserve


class NormalTransform(NamedTuple):
    """A map from standard normal noise to draws of a distribution.

    Attributes:
        noise_shape: Shape of the noise of one draw; the noise of a whole distribution has shape
            ``batch_shape + noise_shape``.
        draw: The map.
    """

    noise_shape: torch.Size
    draw: Callable[[Tensor], Tensor]


def normal_transform(fn: TorchDistribution) -> NormalTransform:
    """Writes a distribution as a smooth transform of standard normal noise.

    Arguments:
        fn: A continuous distribution.

    Returns:
        The shape of the noise, and the map.

    Raises:
        ValueError: If no such transform is known.

    Example:
        >>> noise_shape, draw = normal_transform(dist.Gamma(torch.tensor(1.0), 2.0))
        >>> draw(torch.tensor(0.0))  # the median, log(2) / 2
        tensor(0.3466)
    """
    scalar = torch.Size()
    if isinstance(fn, torch_dist.Independent):
        inner = normal_transform(fn.base_dist)
        rank = fn.reinterpreted_batch_ndims
        outer = fn.base_dist.batch_shape[len(fn.base_dist.batch_shape) - rank :]
        return NormalTransform(outer + inner.noise_shape, inner.draw)
    if isinstance(fn, torch_dist.Normal):
        return NormalTransform(scalar, lambda u: fn.loc + fn.scale * u)
    if isinstance(fn, torch_dist.MultivariateNormal):
        return NormalTransform(
            fn.event_shape, lambda u: fn.loc + _matvec(fn._unbroadcasted_scale_tril, u)
        )
    if isinstance(fn, torch_dist.LowRankMultivariateNormal):
        return _low_rank_normal(fn)
    if isinstance(fn, torch_dist.Gamma):
        return NormalTransform(scalar, lambda u: gamma_quantile(fn.concentration, u) / fn.rate)
    if isinstance(fn, torch_dist.Exponential):
        return NormalTransform(scalar, lambda u: _exponential_quantile(u) / fn.rate)
    if isinstance(fn, torch_dist.HalfNormal):
        return NormalTransform(scalar, lambda u: fn.scale * _half_normal_quantile(u))
    if isinstance(fn, torch_dist.Laplace):
        return NormalTransform(scalar, lambda u: fn.loc + fn.scale * _laplace_quantile(u))
    if isinstance(fn, torch_dist.StudentT):
        return NormalTransform(scalar, lambda u: fn.loc + fn.scale * student_quantile(fn.df, u))
    if isinstance(fn, dist.MultivariateStudentT):
        return NormalTransform(
            torch.Size([fn.event_shape[0] + 1]),
            lambda u: (
                fn.loc
                + _matvec(fn.scale_tril, u[..., :-1]) * _t_scale(fn.df, u[..., -1])[..., None]
            ),
        )
    if isinstance(fn, torch_dist.Beta):
        return NormalTransform(
            torch.Size([2]), lambda u: _dirichlet_draw(fn._dirichlet.concentration, u)[..., 0]
        )
    if isinstance(fn, torch_dist.Dirichlet):
        return NormalTransform(fn.event_shape, lambda u: _dirichlet_draw(fn.concentration, u))
    if isinstance(fn, torch_dist.TransformedDistribution) and not folded(fn):
        return _transformed(fn)
    if len(fn.event_shape) == 0 and not getattr(support(fn), "is_discrete", True):
        if has(fn.icdf):
            return NormalTransform(scalar, lambda u: fn.icdf(_normal_cdf(u)))
        if has(fn.cdf):
            return NormalTransform(scalar, lambda u: _inverse_cdf_draw(fn, u))
    raise ValueError(
        f"{type(fn).__name__} is no known smooth transform of normal noise: expected a "
        "location-scale family, a transformed normal, a gamma, beta or Dirichlet distribution, a "
        "mixture of such, or a univariate distribution with a `cdf` or an `icdf`"
    )


def _transformed(fn: torch_dist.TransformedDistribution) -> NormalTransform:
    inner = normal_transform(fn.base_dist)
    outer = fn.base_dist.batch_shape[len(fn.batch_shape) :]

    def draw(u: Tensor) -> Tensor:
        x = inner.draw(u)
        for transform in fn.transforms:
            x = transform(x)
        return x

    return NormalTransform(outer + inner.noise_shape, draw)


def _low_rank_normal(fn: torch_dist.LowRankMultivariateNormal) -> NormalTransform:
    factor, diagonal = fn._unbroadcasted_cov_factor, fn._unbroadcasted_cov_diag
    dimension, rank = factor.shape[-2:]
    return NormalTransform(
        torch.Size([dimension + rank]),
        lambda u: (
            fn.loc + diagonal.sqrt() * u[..., :dimension] + _matvec(factor, u[..., dimension:])
        ),
    )


def folded(fn: torch_dist.TransformedDistribution) -> bool:
    """Whether the distribution folds the line at zero, which is not smooth; its quantiles are."""
    return any(isinstance(transform, AbsTransform) for transform in fn.transforms)


def support(fn: TorchDistribution) -> Any:
    """Where a distribution's values lie."""
    try:
        return fn.support
    except (NotImplementedError, AttributeError):  # torch's mixtures have none since torch 2.13
        return getattr(getattr(fn, "component_distribution", None), "support", constraints.real)


def has(method: Callable[[Tensor], Tensor]) -> bool:
    """Whether a distribution knows its quantile or distribution function."""
    try:
        method(torch.tensor(0.5))
    except (NotImplementedError, ValueError):
        return False
    return True


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _half_normal_quantile(u: Tensor) -> Tensor:
    """That of the absolute value of a normal number."""
    upper = -torch.special.ndtri(0.5 * _normal_tail(u.clamp(min=0.0)))
    lower = math.sqrt(2.0) * torch.special.erfinv(_normal_tail(-u.clamp(max=0.0)))
    return torch.where(u > 0, upper, lower)


def _exponential_quantile(u: Tensor) -> Tensor:
    upper = -torch.log(_normal_tail(u.clamp(min=0.0)))
    lower = -torch.log1p(-_normal_tail(-u.clamp(max=0.0)))
    return torch.where(u > 0, upper, lower)


def _laplace_quantile(u: Tensor) -> Tensor:
    lower, upper = torch.log(2.0 * _normal_tail(-u)), -torch.log(2.0 * _normal_tail(u))
    return torch.where(u > 0, upper, lower)


def _normal_tail(u: Tensor) -> Tensor:
    """What of a normal distribution lies above, with all digits where that is little."""
    return 0.5 * torch.special.erfc(math.sqrt(0.5) * u)


def _normal_cdf(u: Tensor) -> Tensor:
    edge = torch.finfo(u.dtype).eps
    return torch.special.ndtr(u).clamp(edge, 1 - edge)


def _t_scale(df: Tensor, u: Tensor) -> Tensor:
    return (0.5 * df / gamma_quantile(0.5 * df, u)).sqrt()


def _dirichlet_draw(concentration: Tensor, u: Tensor) -> Tensor:
    """Gamma variables by their sum, by logarithms: of small shapes they are below all numbers."""
    gamma = gamma_quantile(concentration, u)
    lowest = math.log(torch.finfo(gamma.dtype).tiny)
    log_level = torch.log(_normal_tail(-u.clamp(max=0.0)))  # above the median none is so low
    power = (log_level + (concentration + 1).lgamma()) / concentration  # their lower tail
    is_low = power < lowest + _MARGIN
    log_gamma = torch.where(is_low, power, torch.where(is_low, 1.0, gamma).log())
    return log_gamma.log_softmax(-1).clamp(min=lowest).exp()


def _inverse_cdf_draw(fn: TorchDistribution, u: Tensor) -> Tensor:
    """A draw by the numerical inverse of ``fn.cdf``, with first derivatives.

    The second derivative in the noise is right, too.
    """
    u = u.expand(torch.broadcast_shapes(u.shape, fn.batch_shape))
    with torch.no_grad():
        positive = support(fn) in (constraints.positive, constraints.nonnegative)
        x = _solve(fn.cdf, fn.log_prob, torch.special.ndtr(u), positive=positive)
        inverse_density = torch.exp(-fn.log_prob(x))
    level = fn.cdf(x)
    moved = torch.special.ndtr(u) - torch.special.ndtr(u).detach() - (level - level.detach())
    first = x + inverse_density * moved

    def slope(noise: Tensor, at: Tensor) -> Tensor:
        return torch.exp(-0.5 * noise.square() - 0.5 * math.log(2 * math.pi) - fn.log_prob(at))

    # Nothing in value and first derivative; the second derivative is that of the slope.
    return first + 0.5 * (slope(u, first) - slope(u, first).detach()) * (u - u.detach())


def _solve(
    cdf: Callable[[Tensor], Tensor],
    log_density: Callable[[Tensor], Tensor],
    level: Tensor,
    *,
    positive: bool,
) -> Tensor:
    """Solves cdf(x) = level: bisection of a line that is logarithmic far out, then Newton."""

    def place(w: Tensor) -> tuple[Tensor, Tensor]:  # x and log dx/dw
        if positive:
            return w.exp(), w
        return w.sinh(), w.cosh().log()

    low = torch.full_like(level, -300.0 if positive else -30.0)
    high = torch.full_like(level, 30.0)
    for _ in range(_BISECTIONS):
        middle = 0.5 * (low + high)
        below = cdf(place(middle)[0]) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    w = 0.5 * (low + high)
    for _ in range(_NEWTON_STEPS):
        x, log_slope = place(w)
        step = (cdf(x) - level) * torch.exp(-log_density(x) - log_slope)
        w = torch.where(step.isfinite(), (w - step).clamp(low, high), w)
    return place(w)[0]
