"""Particles from a program that the user wrote."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.normal_transform import NormalTransform, normal_transform, support
from pyro_hamflow.marginal.proposals.base import Draw

_SUPPORT_CHECKS = 100


class ProgramProposal:
    """Particles from a user's Pyro program, which samples the local sites.

    Arguments:
        distributions: What the program samples each site from, in one run.
        values: What it has drawn.
    """

    stratified = False
    is_defended = False
    enough_particles = 32

    def __init__(self, distributions: dict[str, Any], values: dict[str, Tensor]) -> None:
        self.distributions = distributions
        self.values = values

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        source = self.distributions[name]
        if source.batch_shape != fn.batch_shape or source.event_shape != fn.event_shape:
            raise ValueError(
                f"the proposal samples site '{name}' with batch shape "
                f"{tuple(source.batch_shape)} and event shape {tuple(source.event_shape)}: "
                f"expected {tuple(fn.batch_shape)} and {tuple(fn.event_shape)}, as in the model"
            )
        if not bool(support(source).check(fn.sample((_SUPPORT_CHECKS,))).all()):
            raise ValueError(
                f"the proposal of local site '{name}', {type(source).__name__}, has support "
                f"{support(source)}: expected one that holds every value of its prior, "
                f"{type(fn).__name__}, or the estimate would be too small"
            )
        return program_transform(name, source).noise_shape

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        source, value = self.distributions[name], self.values[name]
        return Draw(value, (fn.log_prob(value) - source.log_prob(value),))


def program_transform(name: str, fn: Any) -> NormalTransform:
    """The transform of a site of a user's proposal; raises a ValueError if none is known."""
    try:
        return normal_transform(fn)
    except ValueError as error:
        raise ValueError(f"the proposal of local site '{name}': {error}") from error
