"""Which local sites are integrated out together, and over which plates."""

from __future__ import annotations

import pyro.poutine as poutine
from pyro.poutine.subsample_messenger import _Subsample

from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import (
    Frames,
    is_deterministic,
    is_enumerable,
    is_latent,
    vectorized_frames,
)


def check_site(trace: poutine.Trace, name: str) -> None:
    """Raises a ValueError if a site is none that could be integrated out."""
    latent = [n for n, site in trace.nodes.items() if is_latent(site)]
    site = trace.nodes.get(name, {"type": None})
    if site["type"] != "sample" or isinstance(site["fn"], _Subsample):
        raise ValueError(f"unknown site '{name}': expected one of the latent sites {latent}")
    if site["is_observed"]:
        raise ValueError(f"site '{name}' is observed: expected one of the latent sites {latent}")
    support = getattr(site["fn"], "support", None)
    if is_enumerable(site):
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


def group_sites(
    trace: poutine.Trace, ordered: list[str], depends: dict[str, list[str]]
) -> tuple[Group, ...]:
    """Joins sites that share a term or their plates.

    Arguments:
        trace: A run of the model.
        ordered: The local sites, in the model's order.
        depends: The local sites that each term depends on.

    Raises:
        ValueError: If sites that share a term lie in different plates, or one of them in none.
    """
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
                    f"plates, {describe_plates(outer)} and {describe_plates(frames[name])}: "
                    "expected the plates of one to enclose the other's; keep one of them among the "
                    "parameters"
                )
            if not outer and frames[name]:
                first = next(n for n in members if frames[n] == outer)
                raise ValueError(
                    f"site '{first}' is global: it lies in no plate, while local site '{name}' "
                    f"in {describe_plates(frames[name])} meets it in one term; expected "
                    f"'{first}' among the parameters"
                )
        terms = tuple(
            term
            for term, local in depends.items()
            if term not in members
            and set(local) & set(members)
            and not is_deterministic(trace.nodes[term])
        )
        event_dims = tuple(trace.nodes[name]["fn"].event_dim for name in members)
        groups.append(Group(members, terms, outer, event_dims))
    return tuple(groups)


def describe_plates(frames: Frames) -> str:
    """Plates in words."""
    return "plate " + " x ".join(f"'{frame.name}'" for frame in frames) if frames else "no plate"
