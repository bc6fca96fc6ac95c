"""Latent sites as parts of one flat vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro.poutine as poutine
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints


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
    """
    sites, start, given = [], 0, dict(transforms or {})
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


def chosen_transform(name: str, site: Any, given: Any) -> Any:
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


def support_of(name: str, fn: Any) -> Any:
    """The support of a site's distribution; raises a ValueError if it has none."""
    try:
        support = fn.support
    except (NotImplementedError, AttributeError):
        # Since torch 2.13 its mixtures tell no support; their components do.
        support = getattr(getattr(fn, "component_distribution", None), "support", None)
    if support is None:
        raise ValueError(
            f"the distribution of site '{name}', {type(fn).__name__}, has no support: expected one "
            "that says where its values lie, such as `constraints.real`"
        )
    return _of_components(support)


def _of_components(support: Any) -> Any:
    """A support in which a mixture's, from torch 2.13 a class of its own, is its components'."""
    of_mixtures: Any = getattr(constraints, "MixtureSameFamilyConstraint", ())
    if isinstance(support, of_mixtures):
        return _of_components(support.base_constraint)
    if isinstance(support, constraints.independent):
        base = _of_components(support.base_constraint)
        return constraints.independent(base, support.reinterpreted_batch_ndims)
    return support


def transform_of(name: str, fn: Any) -> Any:
    """The map from the real line to a site's support; raises a ValueError if none is known."""
    support = support_of(name, fn)
    try:
        return biject_to(support)
    except NotImplementedError as error:
        raise ValueError(
            f"the distribution of site '{name}', {type(fn).__name__}, has support {support}, to "
            "which no map from the real line is registered: expected another distribution, or a "
            "map in `torch.distributions.biject_to`"
        ) from error


def point_of(name: str, fn: Any, like: Tensor) -> tuple[Any, Tensor]:
    """A site's support, and a value in its interior of the shape and type of another."""
    fn = getattr(fn, "component_distribution", fn)
    support = support_of(name, fn)
    if support.is_discrete:
        lowest = torch.as_tensor(getattr(support, "lower_bound", 0.0), device=like.device)
        return support, lowest.to(like.dtype).detach().expand(like.shape)
    transform = transform_of(name, fn)
    zero = like.new_zeros(transform.inverse_shape(like.shape))
    return support, transform(zero).detach()


def is_discrete(name: str, site: Any) -> bool:
    """Whether a site is summed out; raises a ValueError if it is discrete and cannot be."""
    fn = site["fn"]
    if getattr(fn, "has_enumerate_support", False):
        return True
    if getattr(support_of(name, fn), "is_discrete", False):
        raise ValueError(
            f"latent site '{name}' is a {type(fn).__name__}, discrete without finite support: "
            "expected a continuous site, or a discrete one that can be enumerated"
        )
    return False
