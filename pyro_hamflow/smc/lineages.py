"""Whether a population descends from so few of its first particles that its weights are luck.

Where a small part of the space comes to hold the posterior only late along the path, as a narrow
mode does that data agree with, few particles have found it when its weight begins to grow, and all
others die. The weights of steps do not show that, nor need parts of the population differ much: all
may have found too little. Families do, as they are a population's memory (their weights estimate
the evidence's variance from one run): where moves forget where particles were, a family weighs
little more than the steps' weights make it.

References:
    | Variance estimation in the particle filter (Lee, Whiteley, 2018)
    | https://arxiv.org/abs/1509.00394
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.smc.particles import Particles
from pyro_hamflow.smc.resampling import effective_size

# Of families' variance: up to 6 in posteriors whose evidence is right, lines have 300
_EXCESS = 8.0
_FEW = 100.0  # families of equal weight: a relative error of a tenth
_MOST = 50.0  # of a variance, beyond which its exponential says no more


@dataclass(frozen=True)
class Lineages:
    """From how many of its first particles a population descends.

    Attributes:
        effective: How many families of equal weight theirs are worth.
        excess: How many times as much the evidence varies, by families, as it would if moves made
            particles independent of each other at each temperature.
        error: The relative standard error of the evidence that they show.
        draws: How many independent draws the population is worth, for the coordinate of which it
            tells least: what its weights are, or less, as relatives are alike.
    """

    effective: float
    excess: float
    error: float
    draws: float

    @property
    def are_few(self) -> bool:
        """Whether they are few, and that is not for the steps' weights."""
        return self.effective < _FEW and self.excess > _EXCESS


MANY = Lineages(math.inf, 0.0, 0.0, math.inf)


def lineages_of(particles: Particles) -> Lineages:
    """The lineages of a population."""
    effective = float(effective_size(particles.log_families))
    count = len(particles.position)
    square = count / max(effective, 1.0)  # of a family's share, on average, of which one is a mean
    error = math.sqrt(max(square - 1.0, 0.0) / count)
    draws = worth_of_draws(particles.weights, particles.founder, particles.position)
    draws = min(draws, float(effective_size(particles.all_log_weights.flatten())))
    return Lineages(effective, square / particles.variance_of_steps, error, draws)


def worth_of_draws(weights: Tensor, founder: Tensor, position: Tensor) -> float:
    """How many independent draws have as much variance in their means, the least of coordinates.

    Arguments:
        weights: Of the draws, adding up to one.
        founder: Which of as many families each belongs to.
        position: Of shape ``(draws, coordinates)``.

    Example:
        >>> position = torch.tensor([[-1.0], [-1.0], [1.0], [1.0]])
        >>> worth_of_draws(torch.full((4,), 0.25), torch.tensor([0, 0, 3, 3]), position)
        2.0
    """
    position = torch.where(weights[:, None] > 0.0, position.to(weights), 0.0)
    apart = position - weights @ position
    families = torch.zeros_like(apart).index_add(0, founder, weights[:, None] * apart)
    worth = (weights @ apart.square()) / families.square().sum(0)
    return float(worth.nan_to_num(math.inf).min())


def error_of_logarithms(parts: Tensor) -> float:
    """The relative error of a mean of log-normal values, from the variance of their logarithms.

    Where that is large, the mean is held by values too rare to be among a few, whose own spread is
    then too small.

    Example:
        >>> f"{error_of_logarithms(torch.tensor([-2.0, 0.0, 2.0, 0.0])):.2f}"
        '1.83'
    """
    good = parts[parts.isfinite()]
    if len(good) < 2:
        return math.inf
    return math.sqrt(math.expm1(min(float(good.var()), _MOST)) / len(parts))
