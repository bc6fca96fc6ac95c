"""Which parts of a model depend on its local latent variables.

To integrate a site out, one must know the plates around it, the terms of the log density that
depend on it, and that the elements of its plates are independent given the rest. All three are read
off the model itself: the plates from its trace, the dependencies from its operations
(:mod:`~pyro_hamflow.programs.connectivity`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_hamflow.marginal.grouping import check_site, describe_plates, group_sites
from pyro_hamflow.marginal.masked_states import refuse_masked_states
from pyro_hamflow.marginal.structure import LONG, Group, Structure, chains, sites_named
from pyro_hamflow.model.data_faults import fitting, refuse_nan
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.look import cause_of_change
from pyro_hamflow.model.rounding import warn_of_rounding
from pyro_hamflow.model.trace import (
    is_deterministic,
    is_enumerable,
    is_latent,
    log_density,
    outline,
    plate_nesting,
    plate_shape,
    refuse_subsampling,
    run_with,
    vectorized_frames,
)
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.connectivity import NONE, SEVERAL, Owners, ValueReadError, trace_owners
from pyro_hamflow.programs.fingerprint import Fingerprint, explained, take_fingerprint
from pyro_hamflow.programs.storages import apart
from pyro_hamflow.programs.validation import no_validation


@dataclass(frozen=True)
class Run:
    """A model with its arguments, and values of its latent sites to run it at.

    Attributes:
        model: The model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        values: A value of each latent site.
    """

    model: Model
    args: Args
    kwargs: Kwargs
    values: dict[str, Tensor]

    def trace(self, values: Mapping[str, Tensor]) -> poutine.Trace:
        """A run at given values of the latent sites."""
        return run_with(self.model, lambda msg: values.get(msg["name"]), *self.args, **self.kwargs)

    def terms(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every term's log densities, and every deterministic site's value."""
        return _terms(self.trace(values))

    def look(self) -> Fingerprint:
        """What the model does with its arguments; equal where an analysis holds as well."""

        def run(*parts: Tensor) -> Any:
            trace = self.trace(dict(zip(self.values, parts, strict=True)))
            return _terms(trace), [outline(name, site) for name, site in trace.nodes.items()]

        return take_fingerprint(run, *self.values.values())

    def owners(self, owners: Mapping[str, Tensor]) -> dict[str, Owners]:
        """Which elements of some sites each term depends on; see :func:`trace_owners`.

        Raises:
            ValueError: If that cannot be told, since control flow or a shape follows a site's
                values.
        """
        try:
            return trace_owners(self.terms, self.values, owners)
        except ValueReadError as error:
            raise ValueError(
                f"what depends on site {_names(owners)} cannot be told: control flow, or the shape "
                f"of a result, follows its values (in operation '{error.operation}'); expected "
                "operations on whole tensors alone, such as `torch.where` in place of `if` or of "
                "`x[x > 0]`"
            ) from error

    def refuse_reading(self, names: Sequence[str]) -> None:
        """Raises a ValueError if sites' values leave torch, where nobody can follow them."""

        def run(*rows: Tensor) -> Tensor:
            values = self.values | dict(zip(names, rows, strict=True))
            return torch.stack([density.sum() for density in self.terms(values).values()])

        with apart(), random_state_kept():
            try:
                # Batched tensors have no memory that could be read past torch.
                rows = [self.values[name][None] for name in names]
                torch.func.vmap(run, randomness="different")(*rows)
            except Exception as error:  # what stands against batching otherwise is no fault
                if "data pointer" in str(error):
                    raise ValueError(
                        f"what depends on site '{names[0]}' cannot be told: the model takes its "
                        "values out of torch, as `numpy()` and `tolist()` do; expected operations "
                        "of torch"
                    ) from error

    def dependents(self, names: Sequence[str]) -> set[str]:
        """All terms that depend on sites, but for the own one of a single site."""
        found = self.owners(dict.fromkeys(names, torch.ones((), dtype=torch.long)))
        return {term for term, o in found.items() if [term] != names and bool(o.of.any())}


def analyse(model: Model, sites: Sequence[str], *args: Any, **kwargs: Any) -> Structure:
    """Finds the plates and the terms of local sites, and refuses what cannot be integrated out.

    Arguments:
        model: A Pyro model.
        sites: The names of the local sites.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Returns:
        The structure.

    Raises:
        ValueError: If a site is unknown, observed, discrete or global, lies in no plate although it
            has independent elements, if its plates' elements are not independent, or if any of
            this cannot be told.
    """
    with random_state_kept():
        torch.manual_seed(0)
        trace = explained(lambda: fitting(run_with(model, lambda msg: None, *args, **kwargs)))
        refuse_subsampling(trace)
        refuse_nan(trace)
        warn_of_rounding(trace)
        latent = [name for name, site in trace.nodes.items() if is_latent(site)]
        sites = [n for name in sites for n in sites_named(name, latent)]
        for name in sites:
            check_site(trace, name)
        values = {n: s["value"].detach() for n, s in trace.nodes.items() if is_latent(s)}
        run = Run(model, args, kwargs, values)
        key = _certain_key(run)
    ordered = [name for name in trace.nodes if name in set(sites)]
    refuse_masked_states(trace, ordered, lambda moved: run.trace(values | dict(moved)))
    discrete = [n for n in values if is_enumerable(trace.nodes[n]) and n not in ordered]
    dependents = {name: run.dependents([name]) for name in discrete}
    for chain in chains(ordered).values():
        found = run.dependents(chain)
        dependents |= dict.fromkeys(chain, found)
        run.refuse_reading(chain)
    depends = {
        term: [name for name in ordered if name == term or term in dependents[name]]
        for term in run.terms(values)
    }
    hidden = {term for term, local in depends.items() if local}
    for term in hidden - set(sites):
        if is_latent(trace.nodes[term]):
            raise ValueError(
                f"site '{depends[term][0]}' is not local: latent site '{term}' depends on it; "
                f"name '{term}' as well, or leave '{depends[term][0]}' among the parameters"
            )
    nesting = plate_nesting(trace)
    groups = []
    for group in group_sites(trace, ordered, depends):
        group = _joined(group, trace, run, nesting)
        _check_enumeration(group, trace, {name: dependents[name] for name in discrete})
        groups.append(group)
    placeholders = {
        name: value
        for name, value in values.items()
        if name in ordered or is_enumerable(trace.nodes[name])
    }
    parameters = tuple(name for name in values if name not in hidden)
    return Structure(
        key, values, tuple(groups), parameters, frozenset(hidden), placeholders, nesting
    )


def _terms(trace: poutine.Trace) -> dict[str, Tensor]:
    with no_validation():
        return {
            name: site["value"] if is_deterministic(site) else log_density(site)
            for name, site in trace.nodes.items()
            if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
        }


def _certain_key(run: Run) -> str:
    """The key of a run; raises a ValueError if it does not say what the model always does."""
    first, second = run.look(), run.look()
    terms, again = first.result[0], second.result[0]
    for term, random in zip(terms, first.random, strict=False):
        if random or _differs(terms[term], again[term]):
            raise ValueError(
                f"the model {cause_of_change(random=random)}: the log density of '{term}' differs "
                "between two runs on the same values; expected all randomness to come from "
                "`pyro.sample`, and data to stay as they are"
            )
    if first.key is None:
        for name in run.values:
            run.dependents([name])  # says which site's values are read
        raise ValueError("control flow of the model follows random numbers of its own")
    if first.key != second.key:
        raise ValueError(
            "the model does something else each time it runs on the same values: expected it to "
            "depend on its arguments and its sample sites alone"
        )
    return first.key


def _differs(first: Tensor, second: Tensor) -> bool:
    return first.shape != second.shape or not torch.equal(
        first.nan_to_num(nan=0.5), second.nan_to_num(nan=0.5)
    )


def _joined(group: Group, trace: poutine.Trace, run: Run, nesting: int) -> Group:
    """A group with its rows, and long plates whose elements meet within its elements."""
    try:
        return replace(group, rows=_check_independence(group, trace, run, nesting))
    except ValueError as error:
        for frame in reversed(group.frames):
            if frame.size >= LONG:
                frames = tuple(other for other in group.frames if other is not frame)
                fewer = replace(group, frames=frames, joined=(*group.joined, frame))
                with suppress(ValueError):
                    return _joined(fewer, trace, run, nesting)
        raise error


def _check_independence(
    group: Group, trace: poutine.Trace, run: Run, nesting: int
) -> dict[str, Tensor]:
    """Refuses elements that depend on each other; returns the rows of terms outside the plates."""
    count = group.shape.numel()
    elements = torch.arange(1, count + 1).reshape(plate_shape(group.frames, nesting))
    owners = {}
    for name, event_dim in zip(group.sites, group.event_dims, strict=True):
        batch = run.values[name].dim() - event_dim
        own = elements.reshape(elements.shape[nesting - batch :] + (1,) * event_dim)
        owners[name] = own.to(run.values[name].device)
    found = run.owners(owners)
    rows = {}
    for term in group.sites + group.terms:
        frames, owner = vectorized_frames(trace.nodes[term]), found[term].of
        if not set(group.frames) <= set(frames):
            if bool((owner == SEVERAL).any()):
                raise ValueError(
                    f"observed site '{term}' depends on local site '{group.sites[0]}' but lies "
                    f"outside its plates, {describe_plates(group.frames)}, and single entries of "
                    f"its log density depend on several elements, which meet in operation "
                    f"'{found[term].mixer}': expected rows that read one element each, as "
                    f"`{group.sites[0]}[index]` does, in a plate of their own"
                )
            rows[term] = owner - 1
        elif group.frames:
            shape = torch.broadcast_shapes(owner.shape, plate_shape(frames, nesting))
            strangers = (owner != NONE) & (owner != elements.to(owner.device))
            if bool(strangers.expand(shape).any()):
                met = found[term].mixer
                raise ValueError(
                    f"the elements of {describe_plates(group.frames)} are not independent given "
                    f"the parameters: '{term}' at one element depends on '{group.sites[0]}' at "
                    "another" + (f" (they meet in operation '{met}')" if met else "")
                )
    return rows


def _check_enumeration(
    group: Group, trace: poutine.Trace, dependents: Mapping[str, set[str]]
) -> None:
    """Refuses discrete sites in plates inside the group's: their sum lies within the estimate."""
    for name, terms in dependents.items():
        frames = vectorized_frames(trace.nodes[name])
        for term in group.terms + group.sites:
            inner = [f.name for f in frames if f not in group.frames or term in group.rows]
            if inner and term in terms:
                raise ValueError(
                    f"discrete site '{name}' lies in plate '{inner[0]}', inside the estimate of "
                    f"'{group.name}', and '{term}' depends on it: expected its sum written as a "
                    "mixture distribution, or the site in the plates of the local sites"
                )


def _names(names: Iterable[str]) -> str:
    return " or ".join(f"'{name}'" for name in names)
