"""Latent values under a mask, or under an improper prior, that nothing depends on.

A mask takes the prior of a latent value away. Where no term depends on the value either, as beyond
the end of a short series, or where ``obs_mask`` says that the datum is known, the density is flat
in it, and chains would drift for ever. There the value keeps its own prior: that integrates to
one whatever the rest is, so the posterior of the rest is what it was, and the value's is what the
model would go on to. A masked value that other terms do depend on is left to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import ImproperUniform, TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, constraints

from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.missing import entries_that_count
from pyro_hamflow.model.supports import base_of
from pyro_hamflow.programs.connectivity import NONE, ValueReadError, trace_owners

Values = dict[str, Tensor]
_BOUNDED = (
    constraints.interval,
    constraints.half_open_interval,
    type(constraints.simplex),
    type(constraints.corr_cholesky),
    type(dist.constraints.corr_matrix),
    type(dist.constraints.sphere),
)


def find_unused(nodes: Mapping[str, Any], log_density: Callable[[Values], Tensor]) -> Values:
    """Which masked entries of latent sites nothing depends on.

    Arguments:
        nodes: The sites' nodes in a trace.
        log_density: The model's, as a function of the sites' values.

    Returns:
        Boolean tensors of the values' shapes, for sites that have such entries.

    Raises:
        ValueError: If nothing depends on entries of an improper site without bounds.
    """
    improper = {n for n, node in nodes.items() if isinstance(base_of(node["fn"]), ImproperUniform)}
    asked = {
        name: entries
        for name, node in nodes.items()
        if (entries := (_improper_entries if name in improper else masked_entries)(node)).any()
    }
    if not asked:
        return {}
    values = {name: node["value"] for name, node in nodes.items()}
    unused = unused_entries(log_density, values, asked)
    for name in improper & set(unused):
        _refuse_improper(name, unused.pop(name))
    return {name: entries for name, entries in unused.items() if entries.any()}


def masked_entries(site: Node) -> Tensor:
    """Which entries of a latent site's value have no prior, for they are masked."""
    value = site["value"]
    counts = torch.as_tensor(entries_that_count(site["fn"], site["mask"]), device=value.device)
    if counts.dim() > value.dim():  # the mask follows a discrete site that is summed out
        return torch.zeros_like(value, dtype=torch.bool)
    return ~counts.expand(value.shape)


def _improper_entries(site: Node) -> Tensor:
    """All entries of an improper site, if its support has no end."""
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    endless = not isinstance(support, _BOUNDED)
    return torch.full_like(site["value"], endless, dtype=torch.bool)


def _refuse_improper(name: str, unused: Tensor) -> None:
    """Raises a ValueError if no term depends on some entries of an improper site."""
    if unused.any():
        raise ValueError(
            f"the posterior of site '{name}' is improper: its prior is flat, and nothing depends "
            f"on {int(unused.sum())} of its {unused.numel()} values; expected a term for each "
            "(an observed site or `pyro.factor`), or a proper prior"
        )


def unused_entries(
    log_density: Callable[[Values], Tensor], values: Mapping[str, Tensor], entries: Values
) -> Values:
    """Which entries of some sites a log density does not depend on.

    Where it has a slope, it depends on them; elsewhere its operations are followed. What they do
    not tell counts as dependence.

    Arguments:
        log_density: A function of the sites' values.
        values: Values of all sites.
        entries: Those in question, boolean tensors of the values' shapes.

    Returns:
        Boolean tensors of the same shapes.
    """
    names = list(entries)
    with torch.enable_grad():
        leaves = {name: values[name].detach().requires_grad_() for name in names}
        density = log_density({**values, **leaves})
        slopes: Sequence[Tensor | None] = [None] * len(names)
        if density.requires_grad:
            slopes = torch.autograd.grad(density, [*leaves.values()], allow_unused=True)
    left = {
        name: entries[name] if slope is None else entries[name] & (slope == 0.0)
        for name, slope in zip(names, slopes, strict=True)
    }
    places = torch.cat([left[name].reshape(-1) for name in names]).nonzero()[:, 0]
    sizes = [left[name].numel() for name in names]

    def whose(chosen: Tensor) -> Values:
        whole = torch.zeros(sum(sizes), dtype=torch.bool, device=places.device)
        whole[chosen] = True
        parts = whole.split(sizes)
        return {n: part.reshape(left[n].shape) for n, part in zip(names, parts, strict=True)}

    def depends(chosen: Tensor) -> bool:
        owners = {name: part.long() for name, part in whose(chosen).items()}
        try:
            found = trace_owners(lambda v: {"density": log_density(v)}, values, owners)
        except ValueReadError:
            return True
        return bool((found["density"].of != NONE).any())

    def search(chosen: Tensor) -> Tensor:
        """By halves: what a whole does not depend on, its parts do not."""
        if not len(chosen) or not depends(chosen):
            return chosen
        if len(chosen) == 1:
            return chosen[:0]
        middle = len(chosen) // 2
        return torch.cat([search(chosen[:middle]), search(chosen[middle:])])

    return whose(search(places))


def with_own_prior(site: Node, unused: Tensor) -> dict[str, Any]:
    """What changes in a node of a trace where its unused entries keep their prior.

    Arguments:
        site: The node.
        unused: Of the shape of its value.
    """
    fn, mask, scale = _unmasked(site["fn"], unused), site["mask"], site["scale"]
    whole = _all_of_events(unused, site["fn"].event_dim)
    if mask is not None:
        mask = mask | whole
    if not isinstance(scale, float | int) or scale != 1:
        scale = torch.where(whole, 1.0, scale)
    return {"fn": fn, "mask": mask, "scale": scale}


def _unmasked(fn: TorchDistribution, unused: Tensor) -> Any:
    if isinstance(fn, MaskedDistribution):
        mask = fn._mask | _all_of_events(unused, fn.event_dim)
        return _unmasked(fn.base_dist, unused).mask(mask)
    if isinstance(fn, ExpandedDistribution):
        return _unmasked(fn.base_dist.expand(fn.batch_shape), unused)
    if isinstance(fn, Independent):
        return _unmasked(fn.base_dist, unused).to_event(fn.reinterpreted_batch_ndims)
    return fn


def _all_of_events(entries: Tensor, event_dim: int) -> Tensor:
    return entries.flatten(entries.dim() - event_dim).all(-1) if event_dim else entries
