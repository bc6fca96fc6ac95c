"""Importance-sampling estimates of a group's likelihood, as functions of noise and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component
from pyro_hamflow.marginal.noise_layout import PRIOR_SHARE, Layout, Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.points import place_points
from pyro_hamflow.marginal.proposals.base import Particle, Proposal, component_log_weight
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import plate_shape
from pyro_hamflow.programs.vectorize import Vectorized


@dataclass(frozen=True)
class Estimate:
    """The particles of one group and their weights, as one run of the model made them.

    Attributes:
        group: The group.
        log_weights: Of shape ``(particles, *plates)``; their log-sum-exp is the log estimate.
        values: The particles of each local site.
        origins: The noise from which the prior would have made the particles of each local site,
            plates at their own dimensions, where the proposal tells.
    """

    group: Group
    log_weights: Tensor
    values: dict[str, Tensor]
    origins: dict[str, Tensor] = field(default_factory=dict)


def estimate(
    plan: Plan,
    proposal: Proposal,
    group: Group,
    u: Tensor,
    parameters: dict[str, Tensor],
    each: Vectorized,
) -> Estimate:
    """The particles of a group and their weights.

    Arguments:
        plan: The model.
        proposal: Where particles come from, fitted if it needs to be.
        group: The group.
        u: Its noise.
        parameters: The values of all sites that are not integrated out.
        each: What applies a function to each particle.
    """
    layout = plan.layouts[group.name]
    log_weights, values, origins = [], [], []
    noise = layout.split(u.to(layout.example))
    for _, together in groupby(range(len(noise)), lambda i: _run_of(proposal, layout.strata[i])):
        numbers = list(together)
        strata = [layout.strata[i] for i in numbers]
        points = [place_points(layout.points, layout.strata[i].count, noise[i]) for i in numbers]
        rows = [torch.cat(points)]
        if len(numbers) > 1:
            counts = torch.tensor([stratum.count for stratum in strata])
            rows.append(torch.tensor(numbers).repeat_interleave(counts).to(u.device))
        components = _components(layout, strata)

        def one(
            coordinates: Tensor,
            source: Tensor | None = None,
            first: Stratum = strata[0],
            components: Mapping[str, Component] = components,
        ) -> Any:
            particle = proposal.particle(plan, group, first, coordinates, parameters, source)
            own = {
                name: of[source] if isinstance(of, Tensor) else of
                for name, of in components.items()
            }
            return _weigh(plan, group, first, own, coordinates, particle, parameters)

        weights, value, origin = each(one, *rows)
        log_weights.append(weights)
        values.append(value)
        origins.append(origin)
    weights = torch.cat(log_weights)
    factors = layout.log_factors.reshape(-1, *[1] * (weights.dim() - 1))
    joined, made_of = (
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in (values, origins)
    )
    return Estimate(group, weights + factors, joined, made_of)


def _run_of(proposal: Proposal, stratum: Stratum) -> object:
    """Equal for particles that one run of the model makes."""
    return stratum.is_shared if proposal.joins_components else stratum.components


def _components(layout: Layout, strata: list[Stratum]) -> dict[str, Component]:
    """Of each site with a mixture prior the component of some strata; if several, that of each."""
    of = {stratum.components for stratum in strata}
    if len(of) == 1:
        return dict(*of)
    found: dict[str, Component] = {}
    for name, _ in strata[0].components:
        found[name] = layout.each([dict(stratum.components)[name] for stratum in layout.strata])
    return found


def _weigh(
    plan: Plan,
    group: Group,
    stratum: Stratum,
    components: Mapping[str, Component],
    coordinates: Tensor,
    particle: Particle,
    parameters: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Draws one particle of every element of a group, and weighs it.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: The particle's, or the first of those that are run together.
        components: Of each site with a mixture prior, which one the particle belongs to.
        coordinates: Its noise, of shape ``(*group.shape, dimension)``.
        particle: What draws it.
        parameters: The values of all sites that are not integrated out.

    Returns:
        Its log weight for each element, the values of the local sites, and their origins, where
        the proposal tells them.
    """
    blocks = plan.layouts[group.name].blocks
    log_ratios: list[list[Tensor]] = []
    others: list[Tensor] = []
    values: dict[str, Tensor] = {}
    origins: dict[str, Tensor] = {}

    def choose(msg: Any) -> Tensor:
        name, fn, scale = msg["name"], msg["fn"], msg["scale"]
        component = components.get(name)
        draw = particle.draw(name, fn, blocks[name].spread(coordinates, group), component)
        parts = []
        if draw.log_ratios:
            log_ratios.append([plan.sum(ratio, msg, group) for ratio in draw.log_ratios])
        if component is not None:
            parts.append(component_log_weight(fn, component))
        if not isinstance(scale, float | int) or scale != 1.0:
            # The model counts this prior otherwise than once. A mask changes nothing: the prior of
            # a masked element integrates to one, and so does its estimate.
            parts.append((scale - 1.0) * fn.log_prob(draw.value))
        others.extend(plan.sum(part, msg, group) for part in parts)
        values[name] = draw.value
        if draw.origin is not None:
            origins[name] = draw.origin
        return draw.value

    terms = plan.run(group, parameters, choose)
    zeros = coordinates.new_zeros(plate_shape(group.frames, plan.structure.nesting))
    ratios = [sum(parts[1:], start=parts[0]) for parts in zip(*log_ratios, strict=True)]
    if ratios:
        ratio, share = particle.mix(ratios)
        ratios = [defended(ratio) if stratum.is_shared else ratio]
        if share is not None:
            others.append(share)
    return sum(ratios + others + terms, start=zeros), values, origins


def defended(log_ratio: Tensor) -> Tensor:
    """The log ratio of a prior density to that of the prior's mixture with a proposal.

    Arguments:
        log_ratio: The log ratio to the proposal's density alone.
    """
    share = log_ratio.new_tensor(PRIOR_SHARE)
    return -torch.logaddexp(torch.log1p(-share) - log_ratio, share.log())
