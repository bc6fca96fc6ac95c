"""Distributions of what is drawn together with its density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor


class DrawnWithDensity(TorchDistribution):
    """A distribution of vectors whose draws come with their log density, which is kept.

    Arguments:
        dimension: Of the vectors.
        draw: From a shape to vectors ``(*shape, dimension)`` and their log densities, ``shape``.
        log_density: Of given vectors ``(*, dimension)``, ``(*,)``.
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        dimension: int,
        draw: Callable[[torch.Size], tuple[Tensor, Tensor]],
        log_density: Callable[[Tensor], Tensor],
        batch_shape: Sequence[int] = (),
    ) -> None:
        self._draw, self._log_density = draw, log_density
        self._drawn: tuple[Tensor, Tensor] | None = None  # the last draw and its log density
        super().__init__(torch.Size(batch_shape), torch.Size([dimension]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DrawnWithDensity:
        (dimension,) = self.event_shape
        return DrawnWithDensity(dimension, self._draw, self._log_density, batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        self._drawn = self._draw(torch.Size(sample_shape) + self.batch_shape)
        return self._drawn[0]

    def log_prob(self, value: Tensor) -> Tensor:
        if self._drawn is not None and value is self._drawn[0]:
            return self._drawn[1]
        return self._log_density(value)
