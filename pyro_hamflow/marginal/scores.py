r"""Priors that are no Gaussians, in coordinates in which they are.

Every continuous prior is a transform of normal noise, :math:`x = g_\theta(z)`, so z is a coordinate
in which it is Gaussian: its normal score. The likelihood, which stays where it is in x, moves in z
with the prior's parameters. Where sites of a likelihood were fitted at parameters
:math:`\theta_0`, at the value :math:`x_0`, the coordinate

.. math:: v = z_0 + (z - z_\theta(x_0))\,
    \frac{z_{\theta_0}'(x_0)}{z_\theta'(x_0)}

is used instead. The prior of v is Gaussian for all parameters, and near :math:`x_0` the coordinate
is the same function of x for all of them, so that the likelihood hardly moves in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributions as torch_dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hamflow.marginal.gamma_quantile import gamma_score
from pyro_hamflow.marginal.normal_transform import NormalTransform, folded, has, normal_transform
from pyro_hamflow.marginal.student_quantile import log_density, log_tails
from pyro_hamflow.marginal.tail_score import log_normal_density, log_tail, score_of_tails

Score = Callable[[Tensor], tuple[Tensor, Tensor]]

_FURTHEST = 20.0  # of the logarithm by which a prior stretches


class Reference(NamedTuple):
    """Where a coordinate is held.

    Attributes:
        value: A value of the site, of its batch and event shape; of Student's t in its own units.
        score: Its normal score under the prior of the fit.
        log_slope: The logarithm of the score's slope there.
    """

    value: Tensor
    score: Tensor
    log_slope: Tensor


class ScoreForm(NamedTuple):
    """A prior as a transform of independent normal coordinates.

    Attributes:
        transform: The map from noise, and its inverse.
        loc: The means of the coordinates, ``(*batch, k)``.
        scale: Their standard deviations, ``(*batch, k)``.
    """

    transform: NormalTransform
    loc: Tensor
    scale: Tensor

    def value(self, v: Tensor) -> Tensor:
        """The site's value at coordinates ``(*batch, k)``."""
        z = (v - self.loc) / self.scale
        return self.transform.draw(z.reshape(z.shape[: z.dim() - 1] + self.transform.noise_shape))


def score_form(fn: TorchDistribution, example: Tensor, near: Reference | None) -> ScoreForm:
    """Writes a prior as a transform of normal noise.

    Arguments:
        fn: The prior.
        example: A tensor of its type and device.
        near: Where the coordinate is held; if not given, it is the normal score itself.

    Raises:
        ValueError: If no such transform is known.
    """
    transform = normal_transform(fn)
    shape = fn.batch_shape + transform.noise_shape
    loc, scale = example.new_zeros(shape), example.new_ones(shape)
    known = _held(fn)
    if near is not None and known is not None:
        score, log_slope = known(near.value)
        scale = (near.log_slope - log_slope).clamp(-_FURTHEST, _FURTHEST).exp()
        loc = near.score - scale * score
    flat = fn.batch_shape + torch.Size([transform.noise_shape.numel()])
    return ScoreForm(transform, loc.expand(shape).reshape(flat), scale.expand(shape).reshape(flat))


def reference(fn: TorchDistribution, value: Tensor) -> Reference | None:
    """Holds the coordinate of a prior at a value; none where it cannot be held."""
    base = fn.base_dist if isinstance(fn, torch_dist.Independent) else fn
    if isinstance(base, torch_dist.StudentT):
        value = ((value - base.loc) / base.scale).detach()
    score = _held(fn)
    return score and Reference(value, *(part.detach() for part in score(value)))


def _held(fn: TorchDistribution) -> Score | None:
    """The score at the values that a reference has.

    Student's t is held in units of its own, against changes of its degrees of freedom alone: held
    where the likelihood is, its coordinate would be bent between there and the centre of a prior
    that has become narrow, far out in whose tail that is.
    """
    if isinstance(fn, torch_dist.Independent):
        return _held(fn.base_dist)
    if not isinstance(fn, torch_dist.StudentT):
        return _score(fn)

    def score(t: Tensor) -> tuple[Tensor, Tensor]:
        z = score_of_tails(*log_tails(fn.df, t)).to(t.dtype)
        return z, log_density(fn.df, t) - log_normal_density(z)

    return score


def _score(fn: TorchDistribution) -> Score | None:
    """The normal score of values and the logarithm of its slope, elementwise.

    Both have first derivatives, in the distribution's parameters too. ``None`` where the
    distribution is no map of one number for each of its own, or its inverse is not known.
    """
    if isinstance(fn, torch_dist.Independent):
        return _score(fn.base_dist)
    if isinstance(fn, torch_dist.TransformedDistribution) and not folded(fn):
        return _transformed(fn)
    if isinstance(fn, torch_dist.Gamma):
        return lambda x: _with_slope(fn, x, gamma_score(fn.concentration, x * fn.rate))
    if isinstance(fn, (torch_dist.Exponential, torch_dist.HalfNormal, torch_dist.Laplace)):
        return lambda x: _with_slope(fn, x, score_of_tails(*_log_tails(fn, x)))
    if isinstance(fn, (torch_dist.StudentT, torch_dist.Beta)) or fn.event_shape or not has(fn.cdf):
        return None

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        edge = torch.finfo(x.dtype).eps
        return _with_slope(fn, x, torch.special.ndtri(fn.cdf(x).clamp(edge, 1 - edge)))

    return score


def _log_tails(fn: TorchDistribution, x: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the distribution function and of what is left above, the smaller right."""
    if isinstance(fn, torch_dist.Laplace):
        t = (x - fn.loc) / fn.scale
        return t.clamp(max=0.0) - math.log(2.0), -t.clamp(min=0.0) - math.log(2.0)
    least = torch.finfo(x.dtype).tiny
    if isinstance(fn, torch_dist.HalfNormal):
        t = (x / fn.scale).clamp(min=least)
        lower = torch.erf(t / math.sqrt(2.0)).log()
        return lower, math.log(2.0) + log_tail(t)
    t = (fn.rate * x).clamp(min=least)
    return torch.log(-torch.expm1(-t)), -t


def _transformed(fn: torch_dist.TransformedDistribution) -> Score | None:
    inner = _score(fn.base_dist)
    if inner is None or any(part.domain.event_dim for part in fn.transforms):
        return None

    def score(x: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = torch.zeros_like(x)
        for part in reversed(fn.transforms):
            before = part.inv(x)
            log_slope = log_slope - part.log_abs_det_jacobian(before, x)
            x = before
        z, inner_slope = inner(x)
        return z, inner_slope + log_slope

    return score


def _with_slope(fn: TorchDistribution, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """A score and its slope, which grows towards a support's ends and is infinite beyond.

    So a likelihood that lies beyond the support of a prior leaves no site in its coordinates.
    """
    log_density = fn.log_prob(x)
    log_density = torch.where(log_density == -torch.inf, torch.inf, log_density)
    return z, log_density + 0.5 * z.square() + 0.5 * math.log(2 * math.pi)
