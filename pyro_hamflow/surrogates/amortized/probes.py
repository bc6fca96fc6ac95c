"""True gradients at a few points about where a posterior is expected, which tell much of it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import ValueAndGradients
from pyro_hamflow.networks.conditional_gaussian import matvec

_MOST_PROBED = 8  # axes: each takes a true gradient of every data set
_LARGEST = 10.0  # of a probed gradient, in logarithms


def probed_points(example: Tensor) -> Tensor:
    """The guess's mean, and a standard deviation from it along each of its first eight axes.

    Arguments:
        example: Positions, of shape ``(*, dimension)``.

    Returns:
        The points in the guess's units, of shape ``(points, dimension)``.
    """
    dimension = example.shape[-1]
    eye = torch.eye(dimension, dtype=example.dtype, device=example.device)
    return torch.cat([torch.zeros_like(eye[:1]), eye[:_MOST_PROBED]])


def probe(value_and_gradient: ValueAndGradients, location: Tensor, root: Tensor) -> Tensor:
    """The true gradients at the points of a guess, in its units, on a logarithmic scale.

    Arguments:
        value_and_gradient: From positions to the potential and its gradient.
        location: The guess's mean, of shape ``(*, dimension)``.
        root: A root of its covariance, of shape ``(*, dimension, dimension)``.

    Returns:
        All gradients of a data set in one row, of shape ``(*, points * dimension)``.
    """
    gradients = [
        matvec(root.mT, value_and_gradient(location + root @ point)[1])
        for point in probed_points(location)
    ]
    joined = torch.cat(gradients, -1)
    scaled = joined.sign() * joined.abs().log1p()
    return scaled.nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST)
