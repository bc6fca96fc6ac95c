"""True gradients at a few points about where a posterior is expected, which tell much of it."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.surrogates.amortized.simulated import ValueAndGradients

_MOST_PROBED = 8  # axes: each takes a true gradient of every data set
_LARGEST = 10.0  # of a probed gradient, in logarithms


def turned(matrix: Tensor, vector: Tensor) -> Tensor:
    """A matrix times a vector, or each of many times its own."""
    return (matrix @ vector[..., None])[..., 0]


def probed_points(example: Tensor) -> Tensor:
    """The guess's mean, and a standard deviation from it along its first axes."""
    dimension = example.shape[-1]
    eye = torch.eye(dimension, dtype=example.dtype, device=example.device)
    return torch.cat([torch.zeros_like(eye[:1]), eye[:_MOST_PROBED]])


def probe(gradient: ValueAndGradients, location: Tensor, root: Tensor) -> Tensor:
    """The true gradients about a guess, in its units and in logarithms, those of one set a row."""
    slopes = [
        turned(root.mT, gradient(location + root @ point)[1]) for point in probed_points(location)
    ]
    joined = torch.cat(slopes, -1)
    tamed = joined.sign() * joined.abs().log1p()
    return tamed.nan_to_num(nan=0.0).clamp(-_LARGEST, _LARGEST)
