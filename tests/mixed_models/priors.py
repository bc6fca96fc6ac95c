"""Prior densities of unconstrained parameters, written down apart from Pyro."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


def _same(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class Prior:
    """A prior of one number or vector.

    Attributes:
        log_density: Of the unconstrained value, entry by entry, up to a constant.
        constrain: From the unconstrained value to the parameter.
        free: Back from there.
        size: How many numbers.
    """

    log_density: Function
    constrain: Function = _same
    free: Function = _same
    size: int = 1


def normal(sd: float, size: int = 1, mean: float = 0.0) -> Prior:
    """Normal."""
    return Prior(lambda x: -0.5 * ((x - mean) / sd) ** 2, size=size)


def half_normal(sd: float, size: int = 1) -> Prior:
    """Half normal; unconstrained by its logarithm, as all that are positive."""
    return _positive(lambda x: -0.5 * (x / sd) ** 2, size)


def half_cauchy(scale: float, size: int = 1) -> Prior:
    """Half Cauchy."""
    return _positive(lambda x: -torch.log1p((x / scale) ** 2), size)


def exponential(rate: float) -> Prior:
    """Exponential."""
    return _positive(lambda x: -rate * x)


def gamma(shape: float, rate: float) -> Prior:
    """Gamma."""
    return _positive(lambda x: (shape - 1) * x.log() - rate * x)


def beta(first: float, second: float) -> Prior:
    """Beta; unconstrained by its logit."""
    log_sigmoid = torch.nn.functional.logsigmoid
    return Prior(
        lambda x: first * log_sigmoid(x) + second * log_sigmoid(-x), torch.sigmoid, torch.logit
    )


def correlation() -> Prior:
    """Uniform between -1 and 1, unconstrained by tanh: LKJ's prior with eta = 1 for two effects."""
    return Prior(
        lambda x: 2 * (math.log(2.0) - x - torch.nn.functional.softplus(-2 * x)),
        torch.tanh,
        lambda factor: torch.atanh(factor[..., 1, 0]),
    )


def ordered(sd: float, size: int) -> Prior:
    """Ordered cut points: the first and the logarithms of the gaps are normal."""

    def constrain(x: Tensor) -> Tensor:
        return torch.cat([x[..., :1], x[..., 1:].exp()], -1).cumsum(-1)

    def free(cuts: Tensor) -> Tensor:
        return torch.cat([cuts[..., :1], cuts.diff(dim=-1).log()], -1)

    return Prior(lambda x: -0.5 * (x / sd) ** 2, constrain, free, size)


def _positive(log_density: Function, size: int = 1) -> Prior:
    return Prior(lambda x: log_density(x.exp()) + x, torch.exp, torch.log, size)
