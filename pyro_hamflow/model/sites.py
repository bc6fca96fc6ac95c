"""Latent sites as parts of one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.supports import support_of, transform_of


class Site(NamedTuple):
    """A latent site's share of a flat vector.

    Attributes:
        name: The site.
        start: Its first coordinate.
        stop: One past its last.
        shape: Its shape on the real line.
        transform: From the real line to the support.
        dtype: Of its values; that of the vector may be wider, for the sake of other sites.
    """

    name: str
    start: int
    stop: int
    shape: torch.Size
    transform: Any
    dtype: torch.dtype


def split(sites: list[Site], flat: Tensor) -> dict[str, Tensor]:
    """Each site's values on the real line, from flat vectors of shape ``(*, dimension)``.

    In one operation, whose gradient is one concatenation and not a sum of padded parts.
    """
    parts = flat.split([site.stop - site.start for site in sites], -1) if sites else ()
    return {
        site.name: part.reshape(part.shape[:-1] + site.shape).to(site.dtype)
        for site, part in zip(sites, parts, strict=True)
    }


def constrain(sites: list[Site], free: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each site's values in its support, from those on the real line."""
    return {site.name: site.transform(free[site.name]) for site in sites}


def flatten(sites: list[Site], values: Mapping[str, Tensor], example: Tensor) -> Tensor:
    """One position, of shape ``(dimension,)``, from values in the sites' supports."""
    parts = [site.transform.inv(values[site.name]).reshape(-1) for site in sites]
    return torch.cat(parts).to(example) if parts else example.new_zeros(0)


def ravel(
    sites: list[Site],
    known: list[Site],
    values: Mapping[str, Tensor],
    num_chains: int,
    example: Tensor,
) -> Tensor:
    """Positions from values on the real line, each with a leading chain dimension.

    Arguments:
        sites: The sites of a position.
        known: Those that may be named, whether they are part of a position or not.
        values: Their values.
        num_chains: How many chains.
        example: A scalar of the type and on the device of positions.

    Raises:
        ValueError: If a site is missing, unknown, or of another shape.
    """
    for name in values:
        if name not in {site.name for site in known}:
            raise ValueError(f"`initial_params` names '{name}': expected {[s.name for s in sites]}")
    parts = []
    for site in sites:
        if site.name not in values:
            raise ValueError(f"`initial_params` lacks a value for site '{site.name}'")
        value = torch.as_tensor(values[site.name])
        expected = (num_chains, *site.shape)
        if tuple(value.shape) != expected:
            raise ValueError(
                f"`initial_params` of site '{site.name}' has shape {tuple(value.shape)}: "
                f"expected {expected}, chains first, on the unconstrained real line"
            )
        parts.append(value.to(example).reshape(num_chains, -1))
    return torch.cat(parts, -1) if parts else example.new_zeros(num_chains, 0)


def add_jacobians(log_joint: Tensor, sites: list[Site], free: Mapping[str, Tensor]) -> Tensor:
    """The log density of values on the real line, from that of the values in the supports."""
    for site in sites:
        value = free[site.name]
        jacobian = site.transform.log_abs_det_jacobian(value, site.transform(value))
        log_joint = log_joint + jacobian.sum()
    return log_joint


def stack_sites(
    latent: Mapping[str, Any], names: list[str], transforms: Mapping[str, Any] | None = None
) -> list[Site]:
    """Gives each named site its share of a flat vector.

    Arguments:
        latent: The sites of a model.
        names: Those that share the vector.
        transforms: From their support to the real line, for sites that are not to be moved by the
            registered map.

    Raises:
        ValueError: If a transform is not one of these sites'.
    """
    sites, start, given = [], 0, dict(transforms or {})
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"`transforms` names {unknown}: expected names of the sites {names}")
    for name in names:
        site = latent[name]
        if name in given:
            transform = chosen_transform(name, site, given[name])
        else:
            transform = transform_of(name, site["fn"])
        free = transform.inv(latent[name]["value"])
        stop = start + free.shape.numel()
        sites.append(Site(name, start, stop, free.shape, transform, free.dtype))
        start = stop
    return sites


def chosen_transform(name: str, site: Node, given: Any) -> Any:
    """The inverse of the map from its support to the real line that was given for a site.

    Raises:
        ValueError: If it leads from the real line to values outside the site's support.
    """
    transform, support = given.inv, support_of(name, site["fn"])
    free = given(site["value"])
    for shift in (-2.0, -0.3, 0.0, 0.3, 2.0):
        if not bool(support.check(transform(torch.full_like(free, shift))).all()):
            raise ValueError(
                f"`transforms` of site '{name}' leads from the real line out of its support "
                f"{support}: expected a map from the support onto the real line"
            )
    return transform


def refuse_moving_supports(
    sites: list[Site], trace: poutine.Trace, transforms: Mapping[str, Any] | None = None
) -> None:
    """Raises a ValueError if a site's support is another one at other values of the rest."""
    for site in sites:
        if transforms and site.name in transforms:
            continue  # whose map does not come from its support
        free = torch.full(site.shape, 0.3, dtype=trace.nodes[site.name]["value"].dtype)
        free = free.to(trace.nodes[site.name]["value"].device)
        there = transform_of(site.name, trace.nodes[site.name]["fn"])(free)
        if not torch.equal(there, site.transform(free)):
            raise ValueError(
                f"the support of site '{site.name}' depends on other latent sites: expected a "
                "fixed one, since values move to the real line by one map; sample it on a unit "
                "scale, then shift and scale it"
            )
