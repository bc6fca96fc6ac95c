"""Missing data: entries that are no numbers, and do not count.

A mask leaves the log density of a missing entry out, but not its derivative: a gradient of zero
times a derivative that is no number is no number either. So densities of observed values are
computed at harmless ones in place of gaps. Gaps in covariates are closed in the graph of a
gradient, once it has shown that the density does not depend on them.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import ExpandedDistribution, MaskedDistribution
from torch import Tensor
from torch.distributions import Independent
from torch.utils._python_dispatch import _disable_current_modes

from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.supports import point_of

_WRAPPERS = (MaskedDistribution, ExpandedDistribution)


def without_gaps(site: Node) -> Any:
    """The value of a site, with harmless numbers where it is masked and not finite.

    Arguments:
        site: A node of a trace.

    Example:
        >>> y = torch.tensor([0.5, torch.nan])
        >>> def model():
        ...     with pyro.plate("data", 2), pyro.poutine.mask(mask=~y.isnan()):
        ...         pyro.sample("y", dist.Normal(0.0, 1.0), obs=y)
        >>> without_gaps(pyro.poutine.trace(model).get_trace().nodes["y"])
        tensor([0.5000, 0.5000])
    """
    value, fn = site["value"], site["fn"]
    if not site["is_observed"] or not isinstance(value, Tensor):
        return value
    counts = entries_that_count(fn, site["mask"])
    if isinstance(counts, bool) or not _has_gaps(value):
        return value
    while counts.dim() > value.dim():  # enumerated values of a site that the mask follows
        counts = counts.any(0)
    counts = _sum_to(counts, value.shape)
    return torch.where(counts, value, _harmless(site["name"], fn, value, counts))


def _has_gaps(value: Tensor) -> bool:
    """Whether not all numbers are finite; ``False`` for values that are not known yet."""
    if not value.is_floating_point():
        return False
    try:
        with _disable_current_modes():  # data are the same in all runs, recorded or not
            return not bool(value.isfinite().all())
    except RuntimeError:  # one value for each chain or particle: it follows latent variables
        return False


def entries_that_count(fn: TorchDistribution, mask: Any) -> Any:
    """Which entries of values count, by a mask of batches and by all masks in a distribution.

    ``True`` or ``False`` if all or none do, else a tensor that broadcasts to the values.
    """
    masks = [(mask, fn.event_dim)]
    while isinstance(fn, MaskedDistribution | ExpandedDistribution | Independent):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    counts: Any = True
    for part, event_dim in masks:
        if isinstance(part, Tensor):
            part = part.reshape(part.shape + (1,) * event_dim)
        if part is not None and part is not True:
            counts = part if counts is True else counts & part
    return counts


def _sum_to(counts: Tensor, shape: torch.Size) -> Tensor:
    """Which entries of a tensor count in any of the places that it is broadcast to."""
    for dim in range(-counts.dim(), 0):
        if shape[dim] == 1 and counts.shape[dim] > 1:
            counts = counts.any(dim, keepdim=True)
    return counts


def _harmless(name: str, fn: TorchDistribution, value: Tensor, counts: Tensor) -> Tensor:
    """A value for each entry at which densities and their derivatives are finite.

    The median of those that count, where it lies in the support: so it is of their size.
    """
    while isinstance(fn, _WRAPPERS):
        fn = fn.base_dist
    events = value.shape[value.dim() - fn.event_dim :]
    median = value.masked_fill(~counts, torch.nan).reshape(-1, *events).nanmedian(0).values
    try:
        support, point = point_of(name, fn, value)
    except ValueError:  # no map from the real line is known
        return median.nan_to_num().expand(value.shape)
    median = torch.where(median.isfinite(), median, point)
    inside = support.check(median)
    return torch.where(inside.reshape(inside.shape + (1,) * support.event_dim), median, point)
