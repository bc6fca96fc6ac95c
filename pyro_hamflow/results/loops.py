"""Sites of a loop, ``x_0``, ``x_1`` and so on, as one variable with a dimension of time."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from pyro_hamflow.model.trace import is_computed
from pyro_hamflow.results.datasets import Array

_FEWEST = 3  # sites that make a loop: two may be a pair that was numbered


class Loop(NamedTuple):
    """Sites that differ in the number at the end of their names alone.

    Attributes:
        stem: Their name without it.
        sites: Their names, by number.
        numbers: Their numbers, one after the other.
    """

    stem: str
    sites: tuple[str, ...]
    numbers: tuple[int, ...]


def find_loops(nodes: Mapping[str, Any], apart: Collection[str]) -> list[Loop]:
    """The loops among a model's sites.

    Sites belong together where they are three or more whose numbers have no gap, where all are
    latent, all observed or all computed, and where they lie in the same plates and have the same
    shape: elements of a plate that is written as a loop are no path. If there is a site with the
    name that they have in common, they stay what they are.

    Arguments:
        nodes: The nodes of a trace.
        apart: Sites that are to keep their names, and with them their loops.

    Example:
        >>> def model():
        ...     for name in ("x_1", "x_2", "x_3", "y_1", "y_3", "y_4"):
        ...         pyro.sample(name, dist.Normal(0.0, 1.0))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> [loop.stem for loop in find_loops(trace.nodes, [])]
        ['x']
    """
    numbered: dict[str, dict[int, str]] = {}
    unclear: set[str] = set()
    for name in nodes:
        found = re.fullmatch(r"(.+?)_*(\d+)", name)
        if found is None:
            continue
        stem, number = found[1], int(found[2])
        if number in numbered.setdefault(stem, {}) or name in apart:
            unclear.add(stem)
        numbered[stem][number] = name
    loops = []
    for stem, sites in numbered.items():
        numbers = tuple(sorted(sites))
        loop = Loop(stem, tuple(sites[number] for number in numbers), numbers)
        is_whole = numbers[-1] - numbers[0] == len(numbers) - 1 and len(numbers) >= _FEWEST
        if is_whole and stem not in nodes and stem not in unclear and _are_alike(loop, nodes):
            loops.append(loop)
    return loops


def _are_alike(loop: Loop, nodes: Mapping[str, Any]) -> bool:
    """Whether values of a loop's sites can lie side by side."""

    def kind(name: str) -> Any:
        node = nodes[name]
        shape = torch.as_tensor(node["value"]).shape
        plates = [tuple(frame) for frame in node["cond_indep_stack"]]
        return is_computed(node), node["is_observed"], plates, shape

    first = kind(loop.sites[0])
    return all(kind(name) == first for name in loop.sites)


def stacked(arrays: Sequence[Array], loops: Sequence[Loop]) -> list[Array]:
    """Arrays with those of each loop as one, which comes where the first of them was.

    A loop of which an array is missing, or whose arrays differ in shape, is left as it is. What
    several sites have together is called by the loops that are all of them.
    """
    by_sites = {array.sites: array for array in arrays}
    for loop in loops:
        parts = [by_sites.get((site,)) for site in loop.sites]
        found = [part for part in parts if part is not None and part.entries is None]
        alike = {(p.value.shape, p.value.dtype, p.frames, p.event_dim) for p in found}
        if len(found) < len(loop.sites) or len(alike) > 1:
            continue
        first = found[0]
        value = torch.stack([p.value for p in found], first.value.dim() - first.event_dim)
        by_sites[first.sites] = Array(
            (loop.stem,),
            value,
            first.frames,
            first.event_dim + 1,
            first.is_density,
            numbers=loop.numbers,
        )
        for part in found[1:]:
            del by_sites[part.sites]
    return [a._replace(sites=_called_by_loops(a.sites, loops)) for a in by_sites.values()]


def _called_by_loops(sites: tuple[str, ...], loops: Sequence[Loop]) -> tuple[str, ...]:
    """What sites are called together: whole loops by what their sites' names have in common."""
    stems: dict[str, str] = {}
    for loop in loops:
        if {*loop.sites} <= {*sites}:
            stems |= dict.fromkeys(loop.sites, loop.stem)
    return tuple(dict.fromkeys(stems.get(site, site) for site in sites))
