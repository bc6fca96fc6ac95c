"""Weights of populations: what they are worth, and how they are made equal again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HALVINGS = 50  # of an interval of temperatures
_PRECISION = 1e-3  # of a step, relative to it
_SMALLEST = 1e-12  # step of the inverse temperature


def normalised(log_weights: Tensor) -> Tensor:
    """Weights that add up to one in each row of ``(*, particles)``; equal where all are zero."""
    dead = log_weights.amax(-1, keepdim=True) == -torch.inf
    return torch.where(dead, 0.0, log_weights).softmax(-1)


def effective_size(log_weights: Tensor) -> Tensor:
    """What the weights of each row of ``(*, particles)`` are worth; zero if all are."""
    total, squares = log_weights.logsumexp(-1), (2.0 * log_weights).logsumexp(-1)
    return (2.0 * total - squares).exp().nan_to_num(0.0)


def conditional_size(log_weights: Tensor, log_increments: Tensor) -> float:
    """What a step of weights is worth, as a share of what they were worth before.

    Particles of weight zero, before or after, count as nothing; a step that kills some is worth
    what the others make of it.

    Arguments:
        log_weights: Of any shape.
        log_increments: What is added to them.
    """
    shares = normalised(log_weights.flatten())
    alive = log_increments.flatten() > -torch.inf
    shares = torch.where(alive, shares, 0.0)
    ratio = (log_increments - log_increments.max()).exp().flatten().nan_to_num(0.0)
    first, second = (shares * ratio).sum(), (shares * ratio.square()).sum()
    return float(first.square() / (second * shares.sum()))


def next_step(log_weights: Tensor, log_ratio: Tensor, most: float, share: float) -> float:
    """How far to go on the path so that the step's weights are worth a share of the particles."""
    if conditional_size(log_weights, most * log_ratio) >= share:
        return most
    low, high = 0.0, most
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        enough = conditional_size(log_weights, middle * log_ratio) >= share
        low, high = (middle, high) if enough else (low, middle)
        if high - low < _PRECISION * low:
            break
    return max(low, _SMALLEST)


def resample_systematically(log_weights: Tensor, num_picked: int | None = None) -> Tensor:
    """Indices of particles, picked by weight in each row, by one uniform number for each row.

    Arguments:
        log_weights: Of shape ``(rows, particles)``; a row without any weight is kept as it is.
        num_picked: How many are picked in each row; as many as there are if not given.

    Returns:
        Indices within the rows, of shape ``(rows, num_picked)``.

    Invariant:
        A particle is picked as often as its weight says on average, and never more than one time
        more or less.

    Example:
        >>> resample_systematically(torch.tensor([[0.5, 0.0, 0.5, 0.0]]).log())
        tensor([[0, 0, 2, 2]])
    """
    rows, count = log_weights.shape
    uniform = torch.rand(rows, 1, dtype=torch.float64, device=log_weights.device)
    picked = count if num_picked is None else num_picked
    levels = (torch.arange(picked, device=log_weights.device) + uniform) / picked
    heights = normalised(log_weights.double()).cumsum(-1)
    heights = heights / heights[:, -1:]
    levels = levels.clamp(max=1.0 - 2.0**-53)
    return torch.searchsorted(heights, levels, right=True).clamp(max=count - 1)


def resample_shuffled(log_weights: Tensor, count: int) -> Tensor:
    """Indices of so many particles, picked by their weights, in random order.

    Arguments:
        log_weights: Of shape ``(particles,)``.
        count: How many are picked, at most as many as there are.

    Example:
        >>> resample_shuffled(torch.tensor([0.0, 1.0, 0.0]).log(), 2)
        tensor([1, 1])
    """
    picked = resample_systematically(log_weights[None])[0]
    return picked[torch.randperm(len(picked), device=picked.device)[:count]]


def log_mean_exp(values: Tensor) -> Tensor:
    """The logarithm of the mean of exponentials along the last dimension."""
    return values.logsumexp(-1) - math.log(values.shape[-1])


def sum_by_family(log_weights: Tensor, founder: Tensor) -> Tensor:
    """The logarithm of what each family's particles weigh together.

    Arguments:
        log_weights: Of all particles, of shape ``(particles,)``.
        founder: Which of as many families each belongs to.

    Example:
        >>> sum_by_family(torch.tensor([0.25, 0.5, 0.25]).log(), torch.tensor([0, 2, 2])).exp()
        tensor([0.2500, 0.0000, 0.7500])
    """
    level = log_weights.max()
    level = torch.where(level.isfinite(), level, 0.0)
    sums = torch.zeros_like(log_weights).index_add(0, founder, (log_weights - level).exp())
    return sums.log() + level
