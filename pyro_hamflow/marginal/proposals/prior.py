"""Particles from the prior."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.normal_transform import normal_transform
from pyro_hamflow.marginal.proposals.base import Draw
from pyro_hamflow.model.float_type import float_type


class PriorProposal:
    """Particles from the prior, as a smooth transform of normal noise.

    They follow every parameter by themselves, and their weights are the likelihood alone, bounded
    wherever the likelihood is.
    """

    stratified = True
    is_defended = False
    enough_particles = 32

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        try:
            source = fn if components is None else fn.component_distribution
            return normal_transform(source).noise_shape
        except ValueError as error:
            raise ValueError(
                f"the prior of local site '{name}' does not serve as a proposal: {error}; or give "
                "`proposal` a function that samples the site"
            ) from error

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        noise = noise.to(float_type(fn, noise.dtype))
        if component is None:
            return Draw(normal_transform(fn).draw(noise), ())
        transform = normal_transform(fn.component_distribution)
        dim = noise.dim() - len(transform.noise_shape)
        value = transform.draw(noise.unsqueeze(dim))
        return Draw(value.select(value.dim() - 1 - len(fn.event_shape), component), ())
