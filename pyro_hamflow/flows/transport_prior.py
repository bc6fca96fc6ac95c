"""Priors of effects, and what data tell of them, found from gradients by least squares."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Points: TypeAlias = Sequence[Tensor]  # what governs, effects, and gradients along these

_ROUNDS = 40  # of least squares, each about what the one before found
_FEW = 10  # that govern, up to which what data tell may depend on them
_MOST_NUMBERS = 5_000_000  # in the equations of all effects
_LEAST_CAUTION, _MOST_CAUTION = 1e-9, 1e9  # of a round, in shares of the equations' diagonal
_GAIN, _SETTLED = 0.99, 4  # what a round has to bring, and how many may bring less in a row
# A residual beyond which points count less, once those further out come in: where a prior governs
# it is exact, and data that are not normal would bend it for the sake of points elsewhere.
_CLOSE = 0.1
_NOTHING = 1e-8  # a mean divergence that is none
_ABOVE = 0.5  # the first logarithm of a scale by data, above most of those of both


def prior_and_data(
    seen: Points,
    beyond: Points,
    constants: Tensor,
    slopes: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""What effects' conditional densities are made of: a prior that others govern, and data.

    Where :math:`b` has a normal prior given :math:`a`, of centre and log scale linear in *a*, and
    data that tell :math:`N(m_2, e^{2v})` of it, the gradient is
    :math:`e^{-2u(a)} (b - m_1(a)) + e^{-2v} (b - m_2)` at every point. All are found together, by
    the method of Levenberg and Marquardt, of each effect by itself; residuals are those of the
    effects' own Fisher divergence. Where those that govern are few, :math:`m_2` and v may be linear
    in them, too.

    Points further out come in at the end: far down a neck they tell a prior's centre and scale to
    many digits, and there an error of a hundredth of the effects' spread is ten of their scales.

    Arguments:
        seen: What may govern the effects, of shape ``(points, governing)``; the effects,
            ``(points, effects)``; and the potential's gradient along them.
        beyond: The same of points further out, if there are any.
        constants: Of centres and log scales without data, to begin with.
        slopes: Of both.
        prior: Constants and slopes of a prior to begin with, if something is known of it.

    Returns:
        Constants of the prior's centres and then of its log scales, ``(2 effects,)``; their slopes,
        ``(governing, 2 effects)``; and constants and slopes of both that data alone would give,
        ``(1 + governing, 2 effects)``.
    """
    a, b, _ = seen
    governing, effects = a.shape[1], b.shape[1]
    reach = governing if governing <= _FEW else 0  # of what data depend on
    widths = [1 + governing, 1 + governing, 1 + reach, 1 + reach]
    mean, size = a.mean(0), a.std(0).clamp(min=1e-12)
    usual = (constants + a @ slopes)[:, effects:].quantile(0.75, 0) + _ABOVE
    if prior is not None:
        constants, slopes = prior
    rows = torch.cat([(constants + mean @ slopes)[None], slopes * size[:, None]])
    none = torch.zeros_like(b[:reach])
    first = [*rows.split(effects, 1), b.mean(0)[None], none, usual[None], none]
    found = torch.cat(first).mT.contiguous()
    everything = [torch.cat(both) for both in zip(seen, beyond, strict=True)]
    for points, close in ((seen, 1.0), (everything, _CLOSE)):
        every = max(1, len(points[0]) * effects * sum(widths) // _MOST_NUMBERS)
        a, b, of_b = (part[::every] for part in points)
        inputs = torch.cat([torch.ones_like(a[:, :1]), (a - mean) / size], -1)
        found = _settled(found, inputs, b, of_b, close)
        if len(beyond[0]) == 0:
            break
    parts = [part.mT for part in found.split(widths, -1)]
    data = torch.zeros_like(rows)
    data[: 1 + reach] = torch.cat(parts[2:], -1)
    governed = torch.cat(parts[:2], -1)
    (constants, slopes), (data_constants, data_slopes) = (
        (part[0] - (mean / size) @ part[1:], part[1:] / size[:, None]) for part in (governed, data)
    )
    return constants, slopes, torch.cat([data_constants[None], data_slopes])


def _settled(found: Tensor, inputs: Tensor, b: Tensor, of_b: Tensor, close: float) -> Tensor:
    r"""The least of the residuals that rounds of least squares lead to.

    Residuals count as :math:`\log(1 + r^2 / c^2)`, c being *close*.
    """
    caution = torch.full_like(found[:, 0], 1e-3)
    settled = 0
    residual, turn = _residuals(found, inputs, b, of_b)
    for _ in range(_ROUNDS):
        weight = 1.0 / (1.0 + (residual / close).square())
        weighted = turn * weight[..., None]
        gram = torch.einsum("nep,neq->epq", weighted, turn)
        slope = torch.einsum("nep,ne->ep", weighted, residual)
        damped = gram + torch.diag_embed(caution[:, None] * gram.diagonal(dim1=1, dim2=2) + 1e-12)
        trial = found - torch.linalg.solve(damped, slope[..., None])[..., 0]
        there, turn_there = _residuals(trial, inputs, b, of_b)
        old, new = (torch.log1p((part / close).square()).sum(0) for part in (residual, there))
        better = new < old  # not so where it is no number
        settled = 0 if bool((new < _GAIN * old).any()) else settled + 1
        found = torch.where(better[:, None], trial, found)
        residual = torch.where(better, there, residual)
        turn = torch.where(better[:, None], turn_there, turn)
        caution = torch.where(better, 0.2 * caution, 5.0 * caution)
        caution = caution.clamp(_LEAST_CAUTION, _MOST_CAUTION)
        if settled == _SETTLED or float(old.max()) < _NOTHING * len(b):
            break
    return found


def _residuals(found: Tensor, inputs: Tensor, b: Tensor, of_b: Tensor) -> tuple[Tensor, Tensor]:
    """What is left of the gradients, ``(points, effects)``, and how it turns with what is found."""
    width = inputs.shape[1]
    inner = inputs[:, : found.shape[1] // 2 - width]
    widths = [width, width, inner.shape[1], inner.shape[1]]
    of_centre, of_scale, of_data, of_error = found.split(widths, -1)
    ahead, log_prior = inputs @ of_centre.mT, inputs @ of_scale.mT
    behind, log_data = inner @ of_data.mT, inner @ of_error.mT
    share = torch.sigmoid(2.0 * (log_data - log_prior))
    log_scale = log_prior - 0.5 * torch.nn.functional.softplus(2.0 * (log_prior - log_data))
    scale, rest = log_scale.exp(), 1.0 - share
    z = (b - share * ahead - rest * behind) / scale
    slope = of_b * scale
    by_centre, by_log = 1.0 / scale, slope + z
    turn = by_centre * 2.0 * share * rest * (ahead - behind)
    columns = [
        (by_centre * share)[..., None] * inputs[:, None],
        (by_log * share - turn)[..., None] * inputs[:, None],
        (by_centre * rest)[..., None] * inner[:, None],
        (by_log * rest + turn)[..., None] * inner[:, None],
    ]
    return slope - z, torch.cat(columns, -1)
