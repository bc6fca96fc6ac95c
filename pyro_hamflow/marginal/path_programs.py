"""What is captured of a path's densities, and kept with what is known of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_covariance import covariance_looks, has_covariance
from pyro_hamflow.marginal.path_density import (
    Order,
    Parts,
    PartsAt,
    PathCoordinates,
    captured_parts,
    path_parts,
)
from pyro_hamflow.marginal.path_looks import LookAt
from pyro_hamflow.marginal.path_modes import captured_looks, centre_of
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.structure import Group


@dataclass(frozen=True)
class PathPrograms:
    """What is computed again and again of one group's path in one model.

    Attributes:
        parts_at: The log densities of the path, in the order of its sites.
        bands: The path's order and bands.
        look_at: The joint density to second order, in that order.
        by_covariance: Whether the prior is one multivariate normal, whose covariance serves.
    """

    parts_at: PartsAt
    bands: Bands
    look_at: LookAt
    by_covariance: bool


def known_programs(plan: Plan, group: Group, values: Mapping[str, Tensor]) -> PathPrograms | None:
    """What has been captured of a group's path, for values of these parameters."""
    found: PathPrograms | None = plan.structure.programs.get(_key(group, values))
    return found


def made_programs(
    plan: Plan,
    group: Group,
    of_values: PartsAt,
    bands: Bands,
    x: Tensor,
    values: dict[str, Tensor],
) -> PathPrograms:
    """Captures what is computed of a path, for all proposals of models with this structure.

    Arguments:
        plan: The model.
        group: The path's sites.
        of_values: The log densities of the path, in the order of its sites.
        bands: The path's order and bands.
        x: A path in that order.
        values: Values of the parameters.
    """
    parts_at = partial(in_order, of_values, bands.order)
    by_covariance = has_covariance(bands, x.shape[-1], group, plan.trace(values))
    if by_covariance:
        look_at = covariance_looks(plan, group, parts_at, x, values)
    else:
        look_at = captured_looks(parts_at, bands, x, values)
    made = PathPrograms(of_values, bands, look_at, by_covariance)
    plan.structure.programs[_key(group, values)] = made
    return made


def prior_centre(
    plan: Plan, group: Group, programs: PathPrograms, x: Tensor, values: dict[str, Tensor]
) -> Tensor:
    """The centre of a path's prior, as far as a path x tells it."""
    if programs.by_covariance:
        centre: Tensor = plan.trace(values).nodes[group.sites[0]]["fn"].loc
        return centre
    prior = in_order(programs.parts_at, programs.bands.order, values).prior
    return centre_of(prior, x, programs.bands.prior)


def _key(group: Group, values: Mapping[str, Tensor]) -> tuple[object, ...]:
    """Programs hold constants, in the precision that they were captured with."""
    types = frozenset((name, value.dtype) for name, value in values.items())
    return group.name, types, torch.get_default_dtype()


def densities_at(
    plan: Plan, path: PathCoordinates, x: Tensor, values: dict[str, Tensor]
) -> PartsAt:
    """The log densities of a path for values of the parameters, captured where that is possible."""
    try:
        return captured_parts(plan, path, x, values)
    except Exception:  # whatever the model's own code may raise
        return partial(path_parts, plan, path)


def in_order(of_values: PartsAt, order: Order, parameters: dict[str, Tensor]) -> Parts:
    """Log densities as functions of the path in another order."""
    prior, likelihood = of_values(parameters)
    return Parts(lambda x: prior(order.to_sites(x)), lambda x: likelihood(order.to_sites(x)))
