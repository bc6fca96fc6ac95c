"""Coordinates in which a posterior is about standard."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor


def standardise(position: Tensor, loc: Tensor, scale_tril: Tensor) -> Tensor:
    """Positions ``(*, dimension)`` in coordinates of a centre and a unit.

    Arguments:
        position: What to move.
        loc: Where the coordinates have zero, of shape ``(dimension,)``.
        scale_tril: A unit of them, a lower triangle of shape ``(dimension, dimension)``.
    """
    return torch.linalg.solve_triangular(scale_tril, (position - loc).mT, upper=False).mT


def standardised(base: Any, loc: Tensor, scale: Tensor) -> Any:
    """A distribution of positions as one of the coordinates, whose scale is diagonal.

    Arguments:
        base: The distribution, with event shape ``(dimension,)``.
        loc: Where the coordinates have zero.
        scale: Their units, of shape ``(dimension,)``.
    """
    transform = dist.transforms.AffineTransform(-loc / scale, 1.0 / scale, event_dim=1)
    return dist.TransformedDistribution(base, [transform])
