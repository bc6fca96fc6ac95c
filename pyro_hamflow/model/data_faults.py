"""Data that a model cannot have seen: of another shape, outside their support, or no numbers."""

from __future__ import annotations

from contextlib import suppress

import pyro.poutine as poutine
import torch
from pyro.distributions.util import broadcast_shape  # torch's takes a third of a second to import
from torch import Tensor
from torch.distributions import Independent

from pyro_hamflow.model.kinds import Node
from pyro_hamflow.model.supports import support_of
from pyro_hamflow.model.trace import is_deterministic, log_density
from pyro_hamflow.programs.validation import no_validation


def fitting(trace: poutine.Trace) -> poutine.Trace:
    """The trace; raises a ValueError if data do not fit the distribution they are observed from."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or is_deterministic(site):
            continue
        value, expected = site["value"], site["fn"].shape()
        if not isinstance(value, Tensor):
            continue
        try:
            broadcast_shape(value.shape, expected)
            continue
        except ValueError:
            pass
        with no_validation(), suppress(Exception):
            log_density(site)  # some have a shape of their own
            continue
        raise ValueError(
            f"the data of observed site '{name}' have shape {tuple(value.shape)}: expected "
            f"{tuple(expected)}, that of its distribution in its plates"
        )
    return trace


def describe_impossible(trace: poutine.Trace) -> str:
    """Which data lie outside their support, as the rest of a sentence; nothing if none do."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or is_deterministic(site):
            continue
        with no_validation():
            if bool(log_density(site).isfinite().all()):
                continue
        support = support_of(name, site["fn"])
        outside = ~support.check(site["value"])
        if bool(outside.any()):
            return (
                f"; {int(outside.sum())} of {outside.numel()} data of observed site '{name}' lie "
                f"outside its support, {support}"
            )
    return ""


def refuse_nan(trace: poutine.Trace) -> None:
    """Raises a ValueError if data that count are not numbers; says what to write instead."""
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not site["is_observed"] or is_deterministic(site):
            continue
        value = site["value"]
        if not isinstance(value, Tensor) or not value.isnan().any():
            continue
        with no_validation():
            if not log_density(site).isnan().any():
                continue
        count = int(value.isnan().sum())
        raise ValueError(
            f"the data of observed site '{name}' contain NaN ({count} of {value.numel()} "
            f"values): expected numbers, or {_mask_over_missing(site)}"
        )


def _mask_over_missing(site: Node) -> str:
    """What to write for a site whose data are incomplete."""
    fn, entries = site["fn"], "~data.isnan()"
    if not fn.event_dim:
        return f"`poutine.mask(mask={entries})` around the site"
    whole = bool(site["value"].isnan().flatten(-fn.event_dim).any(-1).eq(True).all())
    events = f"`poutine.mask` over whole events, by a mask of shape {tuple(fn.batch_shape)}"
    if isinstance(fn, Independent):
        return f"`.mask({entries})` on the distribution before its `.to_event`"
    if whole or fn.batch_shape == torch.Size():
        events = "the marginal distribution of the entries that are seen"
    return (
        f"{events}; entries of a joint distribution may be latent sites under "
        "`.mask(False)`, put in place by `torch.where` before the whole is observed"
    )
