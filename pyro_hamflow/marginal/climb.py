"""A climb by quasi-Newton steps that comes to rest within a small part of a deviation."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_STEPS = 100  # at most
_TRIALS = 12  # of steps, each shorter than the last by .3
_MEMORY = 20  # changes of position and slope that Newton's direction is made of
_FIRST_LENGTH = 1.0  # the longest change of an unconstrained coordinate at first; then it grows
_SLACK = 0.1  # by which the potential may rise where its slope falls: gradients are approximate
_LEAST = 1e-4  # of the potential's fall by a step that is made shorter: less does not show
NEAR = 0.05  # posterior standard deviations
SAME = 0.1  # of unconstrained coordinates, within which ends of climbs are one top
_BELOW = 2.0  # a top's logarithm, from where on a step that leads to it is believed


class Top(NamedTuple):
    """Where a climb ended; see :class:`~pyro_hamflow.marginal.pilot.Pilot`."""

    position: Tensor
    value: float
    distance: float
    pairs: Sequence[tuple[Tensor, Tensor]] = ()  # of steps and slopes' changes, the curvature


def climb(
    gradient: Callable[[Tensor], tuple[float, Tensor]],
    start: Tensor,
    known: Sequence[tuple[Tensor, Tensor]] = (),
    tops: Sequence[Top] = (),
) -> Top:
    """Minimises a potential by L-BFGS.

    It has come to rest when a full step would lead by less than a small part of a posterior
    standard deviation, as the inverse curvature found on the way tells, twice in a row; or when one
    leads to a top that is known already, not far below it.

    Arguments:
        gradient: From a position to the potential and its gradient.
        start: Where to begin.
        known: What an earlier climb has found of the curvature.
        tops: Where others came to rest.
    """
    position = start
    value, slope = gradient(position)
    pairs = list(known)
    distance, rests, longest = math.inf, 0, _FIRST_LENGTH
    for _ in range(_STEPS):
        if not (math.isfinite(value) and bool(slope.isfinite().all())):
            break
        step = -_newton(pairs, slope)
        for top in tops:
            gap = float((position + step - top.position).abs().max())
            if gap <= SAME and value - top.value <= _BELOW:
                return top
        distance = math.sqrt(float(-(slope @ step)))
        is_near = bool(pairs) and position is not start and distance <= NEAR
        rests = rests + 1 if is_near else 0
        if rests == 2:
            break
        step = step * min(1.0, longest / max(float(step.abs().max()), 1e-300))
        fall = float(-(slope @ step))
        for trial in range(_TRIALS):
            if trial and fall < _LEAST:
                continue
            new = position + step
            new_value, new_slope = gradient(new)
            if new_value <= value - 1e-4 * fall and bool(new_slope.isfinite().all()):
                break
            if new_value <= value + _SLACK and abs(float(new_slope @ step)) <= 0.9 * fall:
                break
            step, fall, longest = 0.3 * step, 0.3 * fall, 0.3 * float(step.abs().max())
        else:
            if not pairs:
                break
            pairs = []
            continue
        longest = max(longest, 2.0 * float(step.abs().max()))
        change = new - position, new_slope - slope
        if float(change[0] @ change[1]) > 1e-10 * float(change[1].square().sum()):
            pairs = [*pairs, change][-_MEMORY:]
        position, value, slope = new, new_value, new_slope
    return Top(position, value, distance, pairs)


def newton_distance(pairs: Sequence[tuple[Tensor, Tensor]], slope: Tensor) -> float:
    """The length of Newton's step, in posterior standard deviations; infinite if not known."""
    if not pairs or not bool(slope.isfinite().all()):
        return math.inf
    return math.sqrt(max(float(slope @ _newton(pairs, slope)), 0.0))


def covariance_of(pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor | None:
    """The inverse curvature, ``(dimension, dimension)``; none if nothing is known of it."""
    if not pairs:
        return None
    step, _ = pairs[-1]
    unit = torch.eye(len(step), dtype=step.dtype, device=step.device)
    return torch.stack([_newton(pairs, row) for row in unit])


def _newton(pairs: Sequence[tuple[Tensor, Tensor]], slope: Tensor) -> Tensor:
    """The slope times the inverse curvature that pairs of steps and slopes' changes tell of."""
    result, shares = slope.clone(), []
    for step, change in reversed(pairs):
        share = (step @ result) / (step @ change)
        result = result - share * change
        shares.append(share)
    if pairs:
        step, change = pairs[-1]
        result = result * (step @ change) / (change @ change)
    for (step, change), share in zip(pairs, reversed(shares), strict=True):
        result = result + step * (share - (change @ result) / (step @ change))
    return result
