"""Importance-sampling estimates of a group's likelihood, as functions of noise and parameters."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.noise_layout import PRIOR_SHARE, Stratum
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
    log_weights, values, origins, start = [], [], [], 0
    parts = zip(layout.strata, layout.split(u.to(layout.example)), strict=True)
    for _, alike in groupby(parts, lambda pair: pair[0].components):
        strata, parts_alike = zip(*alike, strict=True)
        points = [
            place_points(layout.points, stratum.count, part)
            for stratum, part in zip(strata, parts_alike, strict=True)
        ]
        rows = [torch.cat(points)]
        stop = start + len(rows[0])
        sources = proposal.sources(layout, strata[0])
        if sources is not None:
            rows.append(sources[start:stop])

        def one(
            coordinates: Tensor, source: Tensor | None = None, stratum: Stratum = strata[0]
        ) -> Any:
            particle = proposal.particle(plan, group, stratum, coordinates, parameters, source)
            return _weigh(plan, group, stratum, coordinates, particle, parameters)

        weights, value, origin = each(one, *rows)
        log_weights.append(weights)
        values.append(value)
        origins.append(origin)
        start = stop
    weights = torch.cat(log_weights)
    factors = layout.log_factors.reshape(-1, *[1] * (weights.dim() - 1))
    joined, noise = (
        {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        for parts in (values, origins)
    )
    return Estimate(group, weights + factors, joined, noise)


def _weigh(
    plan: Plan,
    group: Group,
    stratum: Stratum,
    coordinates: Tensor,
    particle: Particle,
    parameters: dict[str, Tensor],
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Draws one particle of every element of a group, and weighs it.

    Arguments:
        plan: The model.
        group: The group of local sites.
        stratum: Which components of mixture priors the particle belongs to.
        coordinates: Its noise, of shape ``(*group.shape, dimension)``.
        particle: What draws it.
        parameters: The values of all sites that are not integrated out.

    Returns:
        Its log weight for each element, the values of the local sites, and their origins, where
        the proposal tells them.
    """
    blocks, components = plan.layouts[group.name].blocks, dict(stratum.components)
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
