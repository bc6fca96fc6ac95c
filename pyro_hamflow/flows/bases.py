"""What flows start from."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_hamflow.checks import positive


class SoftUniform(TorchDistribution):
    r"""A uniform distribution on a box whose edges are softened.

    Each coordinate has density :math:`\propto s(x + a)\, s(a - x)`, with s the logistic function:
    it is a uniform number on [-a, a] plus a standard logistic one.

    Arguments:
        dimension: Of the box.
        half_width: a.
        example: A tensor of the type and device to draw on.

    Raises:
        ValueError: If the width is not positive.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023), section 5
        | https://hal.science/hal-03976501

    Example:
        >>> SoftUniform(2, 3.0).log_prob(torch.zeros(2)).round(decimals=3)
        tensor(-3.7830)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, dimension: int, half_width: float = 3.0, *, example: Tensor | None = None
    ) -> None:
        self.half_width = positive("half_width", half_width)
        self._zero = torch.zeros(dimension) if example is None else example.new_zeros(dimension)
        super().__init__(torch.Size(), torch.Size([dimension]), validate_args=False)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.event_shape
        tiny = torch.finfo(self._zero.dtype).tiny
        flat = torch.rand(shape, dtype=self._zero.dtype, device=self._zero.device)
        soft = torch.rand(shape, dtype=self._zero.dtype, device=self._zero.device)
        return self.half_width * (2.0 * flat - 1.0) + soft.clamp(min=tiny).logit()

    def log_prob(self, value: Tensor) -> Tensor:
        edges = torch.nn.functional.logsigmoid
        a = self.half_width
        norm = math.log(-math.expm1(-2.0 * a)) - math.log(2.0 * a)
        return (edges(value + a) + edges(a - value) + norm).sum(-1)


def standard_normal(dimension: int, example: Tensor | None = None, scale: float = 1.0) -> Any:
    """N(0, scale^2 I): standard, or peaked or wide beside its target.

    Arguments:
        dimension: Of its vectors.
        example: A tensor of the type and device to draw on.
        scale: Its standard deviation.
    """
    zero = torch.zeros(dimension) if example is None else example.new_zeros(dimension)
    return dist.Normal(zero, zero + scale).to_event(1)


def students_t(example: Tensor, freedom: float) -> Any:
    """Independent coordinates of Student's t.

    Arguments:
        example: A vector of the dimension, type and device to draw on.
        freedom: The degrees of freedom.
    """
    return dist.StudentT(example.new_full(example.shape, freedom)).to_event(1)


def map_tensors(thing: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a distribution with all its tensors changed, as modules do when they move."""
    if isinstance(thing, Tensor):
        return function(thing)
    if isinstance(thing, list | tuple) and not isinstance(thing, torch.Size):
        return type(thing)(map_tensors(part, function) for part in thing)
    if isinstance(thing, Distribution | Transform):
        moved = copy.copy(thing)
        for name, part in vars(thing).items():
            moved.__dict__[name] = map_tensors(part, function)
        return moved
    return thing
