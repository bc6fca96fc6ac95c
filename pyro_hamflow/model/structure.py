"""Which parts of a model depend on its local latent variables.

To integrate a site out, one must know the plates around it, the terms of the log density that
depend on it, and that the elements of its plates are independent given the rest. All three are read
off the model itself: the plates from its trace, the dependencies by moving the local values and
watching which terms move with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Independent

from pyro_hamflow.model.missing import without_gaps
from pyro_hamflow.model.validation import no_validation

Frames = tuple[CondIndepStackFrame, ...]


@dataclass(frozen=True)
class Group:
    """Local sites that are integrated out together, one estimate per element of their plates.

    Attributes:
        sites: The local sites, in the model's order.
        terms: Observed sites whose log densities enter the estimate.
        frames: The plates around the group, leftmost first.
        event_dims: The number of event dimensions of each site.
    """

    sites: tuple[str, ...]
    terms: tuple[str, ...]
    frames: Frames
    event_dims: tuple[int, ...]

    @property
    def name(self) -> str:
        return "_".join(self.sites)

    @property
    def shape(self) -> torch.Size:
        """The shape of the group's independent elements."""
        return torch.Size(frame.size for frame in self.frames)


@dataclass(frozen=True)
class Structure:
    """What :func:`analyse` finds out about a model.

    Attributes:
        groups: The groups of local sites.
        parameters: The latent sites that stay, discrete ones included.
        hidden: Sites that take part in an estimate, or follow from local values.
        placeholders: A value for each local and each discrete site, to run the rest with.
        nesting: How many dimensions, counted from the right, are plates.
    """

    groups: tuple[Group, ...]
    parameters: tuple[str, ...]
    hidden: frozenset[str]
    placeholders: dict[str, Tensor]
    nesting: int


def vectorized_frames(site: Any) -> Frames:
    """The vectorised plates around a site, leftmost dimension first."""
    frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
    return tuple(sorted(frames, key=lambda frame: frame.dim))


def is_latent(site: Any) -> bool:
    """Whether a node of a trace is a latent sample site."""
    return (
        site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
    )


def is_deterministic(site: Any) -> bool:
    """Whether a sample site records a deterministic value."""
    return bool(site["infer"].get("_deterministic", False))


def refuse_subsampling(trace: poutine.Trace) -> None:
    """Raises a ValueError if the model sees a random part of its data only."""
    for name, site in trace.nodes.items():
        if isinstance(site.get("fn"), _Subsample):
            size, part = site["fn"].size, site["fn"].subsample_size
            if part is not None and part < size:
                raise ValueError(
                    f"plate '{name}' is subsampled ({part} of {size} elements): expected all of "
                    "its elements, since a density of part of the data is not the posterior's"
                )


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


def _mask_over_missing(site: Any) -> str:
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


def log_density(site: Any) -> Tensor:
    """A sample site's log density, scaled and masked as the model says, not summed."""
    density = site["fn"].log_prob(without_gaps(site), *site["args"], **site["kwargs"])
    return scale_and_mask(density, site["scale"], site["mask"])


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
    term = term.expand(torch.broadcast_shapes(term.shape, plate_shape(frames, nesting)))
    kept = {frame.dim for frame in group}
    summed = [dim for dim in range(-nesting, 0) if dim not in kept]
    return term.sum(summed, keepdim=True) if summed else term


class SetValues(poutine.messenger.Messenger):
    """Gives latent sites values, by a function of the site's message; ``None`` leaves them free."""

    def __init__(self, choose: Callable[[Message], Tensor | None]) -> None:
        super().__init__()
        self.choose = choose

    def _pyro_sample(self, msg: Message) -> None:
        if msg["is_observed"] or msg["done"] or isinstance(msg["fn"], _Subsample):
            return
        value = self.choose(msg)
        if value is not None:
            msg["value"] = value
            msg["done"] = True


def run_with(
    model: Callable[..., Any],
    choose: Callable[[Message], Tensor | None],
    *args: Any,
    **kwargs: Any,
) -> poutine.Trace:
    """Traces a model, hidden from all outer handlers, with chosen values at its latent sites."""
    with poutine.block(), no_validation(), SetValues(choose):
        return poutine.trace(model).get_trace(*args, **kwargs)


def analyse(
    model: Callable[..., Any], sites: Sequence[str], *args: Any, **kwargs: Any
) -> Structure:
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
            has independent elements, or if its plates' elements are not independent.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trace = run_with(model, lambda msg: None, *args, **kwargs)
        refuse_subsampling(trace)
        refuse_nan(trace)
        for name in sites:
            _check_site(trace, name)
        values = {n: s["value"].detach() for n, s in trace.nodes.items() if is_latent(s)}
        moved = run_with(model, lambda msg: None, *args, **kwargs)
        other = {name: moved.nodes[name]["value"].detach() for name in sites}

    def terms_at(local: dict[str, Tensor]) -> dict[str, Tensor]:
        """Every term's log densities, and every deterministic site's value."""
        known = values | local
        run = run_with(model, lambda msg: known.get(msg["name"]), *args, **kwargs)
        return {
            name: (site["value"] if is_deterministic(site) else log_density(site)).detach()
            for name, site in run.nodes.items()
            if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
        }

    ordered = [name for name in trace.nodes if name in set(sites)]
    base, again = terms_at({}), terms_at({})
    for term in base:
        if _differs(base[term], again[term]):
            raise ValueError(
                f"the model draws random numbers that are no sample sites: the log density of "
                f"'{term}' differs between two runs on the same values; expected all randomness "
                "to come from `pyro.sample`"
            )
    moves = {name: terms_at({name: other[name]}) for name in ordered}
    depends = {
        term: [name for name in ordered if name == term or _differs(base[term], moves[name][term])]
        for term in base
    }
    hidden = {term for term, local in depends.items() if local}
    for term in hidden - set(sites):
        if is_latent(trace.nodes[term]):
            raise ValueError(
                f"site '{depends[term][0]}' is not local: latent site '{term}' depends on it; "
                f"name '{term}' as well, or leave '{depends[term][0]}' among the parameters"
            )
    nesting = plate_nesting(trace)
    groups = _group(trace, ordered, depends)
    for group in groups:
        _check_independence(group, trace, values, other, terms_at, base, nesting)
        _check_enumeration(group, trace, moved, terms_at, base)
    placeholders = {
        name: value
        for name, value in values.items()
        if name in ordered or getattr(trace.nodes[name]["fn"], "has_enumerate_support", False)
    }
    parameters = tuple(name for name in values if name not in hidden)
    return Structure(groups, parameters, frozenset(hidden), placeholders, nesting)


def plate_nesting(trace: poutine.Trace) -> int:
    """How many dimensions, counted from the right, the plates of a model take."""
    sites = (site for site in trace.nodes.values() if site["type"] == "sample")
    return depth_of(frame for site in sites for frame in vectorized_frames(site))


def _check_site(trace: poutine.Trace, name: str) -> None:
    latent = [n for n, site in trace.nodes.items() if is_latent(site)]
    site = trace.nodes.get(name, {"type": None})
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        raise ValueError(f"unknown site '{name}': expected one of the latent sites {latent}")
    if site["is_observed"]:
        raise ValueError(f"site '{name}' is observed: expected one of the latent sites {latent}")
    support = getattr(site["fn"], "support", None)
    if getattr(site["fn"], "has_enumerate_support", False):
        raise ValueError(
            f"local site '{name}' is discrete and enumerable: expected a continuous site (leave "
            "discrete sites out, they are summed exactly)"
        )
    if not site["value"].is_floating_point() or getattr(support, "is_discrete", False):
        raise ValueError(f"local site '{name}' is discrete: expected a continuous site")
    if any(not frame.vectorized for frame in site["cond_indep_stack"]):
        raise ValueError(
            f"local site '{name}' lies in a sequential plate, written as a loop: expected a "
            "vectorised plate, `with pyro.plate(...)`"
        )
    plates = {frame.dim for frame in vectorized_frames(site)}
    shape = site["fn"].batch_shape
    for dim in range(-len(shape), 0):
        if shape[dim] > 1 and dim not in plates:
            raise ValueError(
                f"the plate of local site '{name}' cannot be told: its batch shape "
                f"{tuple(shape)} has {shape[dim]} elements at dimension {dim}, which no plate "
                "declares; expected `pyro.plate` around independent elements, or `.to_event` "
                "for one joint estimate"
            )


def _differs(first: Tensor, second: Tensor) -> bool:
    return first.shape != second.shape or not torch.equal(
        first.nan_to_num(nan=0.5), second.nan_to_num(nan=0.5)
    )


def _group(
    trace: poutine.Trace, ordered: list[str], depends: dict[str, list[str]]
) -> tuple[Group, ...]:
    """Joins sites that share a term or their plates."""
    leader = {name: name for name in ordered}

    def join(first: str, second: str) -> None:
        old, new = leader[second], leader[first]
        for name in ordered:
            if leader[name] == old:
                leader[name] = new

    frames = {name: vectorized_frames(trace.nodes[name]) for name in ordered}
    for local in depends.values():
        for name in local[1:]:
            join(local[0], name)
    for i, name in enumerate(ordered):
        for later in ordered[i + 1 :]:
            if frames[name] == frames[later]:
                join(name, later)
    groups = []
    for head in dict.fromkeys(leader.values()):
        members = tuple(name for name in ordered if leader[name] == head)
        outer = min((frames[name] for name in members), key=len)
        for name in members:
            if not set(outer) <= set(frames[name]):
                first = next(n for n in members if frames[n] == outer)
                raise ValueError(
                    f"local sites '{first}' and '{name}' meet in one term but lie in different "
                    f"plates, {_plates(outer)} and {_plates(frames[name])}: expected the plates "
                    "of one to enclose the other's; keep one of them among the parameters"
                )
            if not outer and frames[name]:
                first = next(n for n in members if frames[n] == outer)
                raise ValueError(
                    f"site '{first}' is global: it lies in no plate, while local site '{name}' "
                    f"in {_plates(frames[name])} meets it in one term; expected '{first}' among "
                    "the parameters"
                )
        terms = tuple(
            term
            for term, local in depends.items()
            if term not in members
            and set(local) & set(members)
            and not is_deterministic(trace.nodes[term])
        )
        for term in terms:
            if not set(outer) <= set(vectorized_frames(trace.nodes[term])):
                raise ValueError(
                    f"observed site '{term}' depends on local site '{members[0]}' but lies "
                    f"outside its plates {_plates(outer)}: the plate's elements are not "
                    "independent given the parameters"
                )
        event_dims = tuple(trace.nodes[name]["fn"].event_dim for name in members)
        groups.append(Group(members, terms, outer, event_dims))
    return tuple(groups)


def _plates(frames: Frames) -> str:
    return "plate " + " x ".join(f"'{frame.name}'" for frame in frames) if frames else "no plate"


def _check_independence(
    group: Group,
    trace: poutine.Trace,
    values: dict[str, Tensor],
    other: dict[str, Tensor],
    terms_at: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    base: dict[str, Tensor],
    nesting: int,
) -> None:
    """Moves some elements and looks whether a term of the others moves.

    Which elements move is told by the binary digits of their numbers, so that of every two elements
    one moves without the other, and the other way round.
    """
    count, shape = group.shape.numel(), plate_shape(group.frames, nesting)
    for digit in range((count - 1).bit_length()):
        for moves in (False, True):
            chosen = (((torch.arange(count) >> digit) & 1) == int(moves)).reshape(shape)
            mixed = {}
            for name in group.sites:
                value = values[name]
                mask = chosen.reshape(chosen.shape + (1,) * trace.nodes[name]["fn"].event_dim)
                mask = mask.reshape(mask.shape[max(0, mask.dim() - value.dim()) :])
                mixed[name] = torch.where(mask.to(value.device), other[name], value)
            moved = terms_at(mixed)
            for term in group.sites + group.terms:
                frames = vectorized_frames(trace.nodes[term])
                still = (~chosen).to(base[term].device)
                before = sum_to_elements(base[term], frames, group.frames, nesting)[still]
                after = sum_to_elements(moved[term], frames, group.frames, nesting)[still]
                tolerance = 1e-9 if before.dtype == torch.float64 else 1e-4
                if not torch.allclose(
                    before, after, equal_nan=True, rtol=tolerance, atol=1e-3 * tolerance
                ):
                    raise ValueError(
                        f"the elements of {_plates(group.frames)} are not independent given the "
                        f"parameters: '{term}' at one element depends on '{group.sites[0]}' at "
                        "another"
                    )


def _check_enumeration(
    group: Group,
    trace: poutine.Trace,
    moved: poutine.Trace,
    terms_at: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    base: dict[str, Tensor],
) -> None:
    """Refuses discrete sites in plates inside the group's: their sum lies within the estimate."""
    for name, site in trace.nodes.items():
        if not is_latent(site) or not getattr(site["fn"], "has_enumerate_support", False):
            continue
        inner = [f.name for f in vectorized_frames(site) if f not in group.frames]
        if not inner:
            continue
        changed = terms_at({name: moved.nodes[name]["value"]})
        for term in group.terms + group.sites:
            if _differs(base[term], changed[term]):
                raise ValueError(
                    f"discrete site '{name}' lies in plate '{inner[0]}', inside the estimate of "
                    f"'{group.name}', and '{term}' depends on it: expected its sum written as a "
                    "mixture distribution, or the site in the plates of the local sites"
                )
