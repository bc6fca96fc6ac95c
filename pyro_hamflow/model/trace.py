"""A model's plates, sites and terms, as one trace of it shows them, and runs at given values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions import Delta, TorchDistribution
from pyro.distributions.util import (
    broadcast_shape,  # torch's takes a third of a second to import
    is_identically_zero,
    scale_and_mask,
)
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_hamflow.model.kinds import Model, Node
from pyro_hamflow.model.missing import without_gaps
from pyro_hamflow.model.supports import base_of, first_value
from pyro_hamflow.programs.validation import no_validation

Frames = tuple[CondIndepStackFrame, ...]


def vectorized_frames(site: Node) -> Frames:
    """The vectorised plates around a site, leftmost dimension first."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return tuple(sorted(frames, key=lambda frame: frame.dim))


def is_latent(site: Node) -> bool:
    """Whether a node of a trace is a latent sample site; one that may only be one value is not."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not isinstance(base_of(site["fn"]), Delta)
    )


def is_enumerable(site: Node) -> bool:
    """Whether a latent site is discrete and can be summed out."""
    return bool(getattr(site["fn"], "has_enumerate_support", False))


def is_deterministic(site: Node) -> bool:
    """Whether a sample site records a deterministic value."""
    fn = base_of(site["fn"])
    fixed = not site["is_observed"] and isinstance(fn, Delta)
    return bool(site["infer"].get("_deterministic", False)) or (
        fixed and is_identically_zero(fn.log_density)
    )


def is_computed(site: Node) -> bool:
    """Whether a sample site's value follows from others.

    That of a deterministic site does, and that of a latent site which Pyro's reparametrisations
    have replaced by others.
    """
    replaced = site["is_observed"] and isinstance(base_of(site["fn"]), Delta)
    return is_deterministic(site) or replaced


def refuse_subsampling(trace: poutine.Trace) -> None:
    """Raises a ValueError if the model sees a part of its data only, drawn or given."""
    for name, site in trace.nodes.items():
        parts = [(f.name, f.full_size, f.size) for f in site.get("cond_indep_stack", ())]
        if isinstance(site.get("fn"), _Subsample):
            parts.append((name, site["fn"].size, site["fn"].subsample_size))
        for plate, size, part in parts:
            if size is not None and part is not None and part < size:
                raise ValueError(
                    f"plate '{plate}' is subsampled ({part} of {size} elements): expected all of "
                    "its elements, since a density of part of the data is not the posterior's"
                )


def log_density(site: Node) -> Tensor:
    """A sample site's log density, scaled and masked as the model says, not summed."""
    density = site["fn"].log_prob(without_gaps(site), *site["args"], **site["kwargs"])
    return scale_and_mask(density, site["scale"], site["mask"])


def outline(name: str, site: Node) -> Any:
    """What a site of a trace is like, beside its values: equal where it is alike."""
    if site["type"] != "sample":
        return name
    fn, frames = site["fn"], site["cond_indep_stack"]
    shapes = getattr(fn, "batch_shape", ()), getattr(fn, "event_shape", ())
    return name, type(fn).__name__, shapes, site["is_observed"], [tuple(f) for f in frames]


def depth_of(frames: Iterable[Any]) -> int:
    """How many dimensions, counted from the right, some plates take."""
    return max((-frame.dim for frame in frames), default=0)


def plate_shape(frames: Frames, nesting: int) -> list[int]:
    """The sizes of some plates at their dimensions, ones elsewhere."""
    shape = [1] * nesting
    for frame in frames:
        shape[frame.dim] = frame.size
    return shape


def sum_to_elements(term: Tensor, frames: Frames, group: Frames, nesting: int) -> Tensor:
    """Sums a term over its own plates but those of a group.

    Arguments:
        term: Log densities; plates are dimensions counted from the right.
        frames: The plates around the term.
        group: The plates to keep.
        nesting: How many dimensions are plates; those further left (enumeration) are kept.

    Returns:
        The sums; dimensions of other plates have size one.
    """
    term = term.expand(broadcast_shape(term.shape, plate_shape(frames, nesting)))
    kept = {frame.dim for frame in group}
    summed = [dim for dim in range(-nesting, 0) if dim not in kept and term.shape[dim] != 1]
    return term.sum(summed, keepdim=True) if summed else term


def sum_rows(term: Tensor, rows: Tensor, group: Frames, nesting: int) -> Tensor:
    """Sums a term outside a group's plates to the elements that its entries belong to.

    Arguments:
        term: Log densities; the last dimensions are those of the rows.
        rows: The element of each entry, counted from zero; -1 where it belongs to none.
        group: The plates of the elements.
        nesting: How many dimensions are plates; those further left (enumeration) are kept.

    Returns:
        The sums; dimensions of other plates have size one.
    """
    shape = plate_shape(group, nesting)
    term = term.expand(broadcast_shape(term.shape, rows.shape))
    outer = term.shape[: term.dim() - max(nesting, rows.dim())]
    belongs, flat = rows.reshape(-1) >= 0, term.reshape(*outer, -1)
    if not bool(belongs.all()):
        flat = flat[..., belongs]
    element = rows.reshape(-1)[belongs]
    sums = flat.new_zeros(*outer, torch.Size(shape).numel())
    return sums.index_add(-1, element, flat).reshape(*outer, *shape)


class SetValues(poutine.messenger.Messenger):
    """Gives latent sites values, by a function of the site's message; ``None`` leaves them free."""

    def __init__(self, choose: Callable[[Message], Tensor | None]) -> None:
        super().__init__()
        self.choose = choose

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or msg["done"] or isinstance(msg["fn"], _Subsample):
            return
        value = self.choose(msg)
        fn: TorchDistribution = msg["fn"]
        if value is None and not getattr(fn, "has_enumerate_support", False):
            value = first_value(msg["name"], fn, *msg["args"], **msg["kwargs"])
        if value is not None:
            msg["value"] = value
            msg["done"] = True


def run_with(
    model: Model,
    choose: Callable[[Message], Tensor | None],
    *args: Any,
    **kwargs: Any,
) -> poutine.Trace:
    """Traces a model, hidden from all outer handlers, with chosen values at its latent sites."""
    with poutine.block(), no_validation(), SetValues(choose):
        return poutine.trace(model).get_trace(*args, **kwargs)


def plate_nesting(trace: poutine.Trace) -> int:
    """How many dimensions, counted from the right, the plates of a model take."""
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    return depth_of(frame for site in sites for frame in vectorized_frames(site))
