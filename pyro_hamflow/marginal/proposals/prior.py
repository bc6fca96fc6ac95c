"""Particles from the prior."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pyro.poutine as poutine
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component, pick
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.normal_transform import normal_transform
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw, Proposal
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.float_type import float_type


class PriorParticle:
    """A particle of the prior, whose weight is the likelihood alone."""

    def draw(
        self, name: str, fn: TorchDistribution, noise: Tensor, component: Component | None
    ) -> Draw:
        noise = noise.to(float_type(fn, noise.dtype))
        if component is None:
            return Draw(normal_transform(fn).draw(noise), ())
        transform = normal_transform(fn.component_distribution)
        dim = noise.dim() - len(transform.noise_shape)
        value = transform.draw(noise.unsqueeze(dim))
        return Draw(pick(value, value.dim() - 1 - len(fn.event_shape), component), ())

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, None]:
        return log_ratios[0], None


@dataclass(frozen=True)
class PriorProposal(Proposal):
    """Particles from the prior, as a smooth transform of normal noise.

    They follow every parameter by themselves, and their weights are the likelihood alone, bounded
    wherever the likelihood is.
    """

    name = "prior"
    joins_components = True
    is_final = False

    def noise_shapes(
        self, plan: Plan, group: Group, trace: poutine.Trace, splits: Mapping[str, int | None]
    ) -> dict[str, torch.Size]:
        return {n: _noise_shape(n, trace.nodes[n]["fn"], split) for n, split in splits.items()}

    def particle(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum,
        coordinates: Tensor,
        parameters: dict[str, Tensor],
        source: Tensor | None,
    ) -> PriorParticle:
        return PriorParticle()


def _noise_shape(name: str, fn: TorchDistribution, components: int | None) -> torch.Size:
    try:
        source = fn if components is None else fn.component_distribution
        return normal_transform(source).noise_shape
    except ValueError as error:
        raise ValueError(
            f"the prior of local site '{name}' does not serve as a proposal: {error}; or give "
            "`proposal` a function that samples the site"
        ) from error
