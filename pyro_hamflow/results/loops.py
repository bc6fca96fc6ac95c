"""Sites of a loop, ``x_0``, ``x_1`` and so on, as one variable with a dimension of time."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message

from pyro_hamflow.model.trace import is_computed, run_with
from pyro_hamflow.programs.sources import Sources
from pyro_hamflow.programs.storages import apart
from pyro_hamflow.programs.validation import no_validation
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


def find_loops(
    nodes: Mapping[str, Any], separate: Collection[str], model: Callable[[], Any]
) -> list[Loop]:
    """The loops among a model's sites.

    Names alone make no loop: coefficients of a regression are numbered, too. Sites of the same name
    but for its number belong together where each depends on one before it, in the same distance:
    they are a path, which may run backwards. And with a path belong sites of one name each of
    which depends on one of its states, or a state on each, such as data and innovations: again in
    the same distance.

    They have to be three or more, whose numbers have no gap, all latent, all observed or all
    computed, in the same plates and of the same shape. If there is a site with the name that they
    have in common, they stay what they are.

    Arguments:
        nodes: The nodes of a trace.
        separate: Sites that are to keep their names, and with them their loops.
        model: The model, with its arguments. It is run once more if names may be a loop's, at the
            nodes' values; if that fails, there are no loops.

    Example:
        >>> def model():
        ...     x = 0.0
        ...     for t in (1, 2, 3):
        ...         pyro.sample(f"beta_{t}", dist.Normal(0.0, 1.0))
        ...         x = pyro.sample(f"x_{t}", dist.Normal(x, 1.0))
        >>> trace = pyro.poutine.trace(model).get_trace()
        >>> [loop.stem for loop in find_loops(trace.nodes, [], model)]
        ['x']
    """
    drawn = {name: place for place, name in enumerate(nodes)}
    numbered = [
        loop if drawn[loop.sites[0]] < drawn[loop.sites[-1]] else _turned(loop)
        for loop in _numbered(nodes, separate)
    ]
    if not numbered:
        return []
    order = {name: i for i, name in enumerate(site for loop in numbered for site in loop.sites)}
    try:
        depends = _dependencies(model, nodes, order)
    except Exception:  # whatever a model does there, its draws are worth more than their order
        return []

    def newest(loop: Loop, on: Loop) -> list[tuple[int, int]]:
        """For the sites of a loop that depend on another: their number, and the newest they do."""
        first, pairs = order[on.sites[0]], []
        for site, number in zip(loop.sites, loop.numbers, strict=True):
            found = (depends[site] >> first) & ((1 << len(on.sites)) - 1)
            if found:
                pairs.append((number, on.numbers[found.bit_length() - 1]))
        return pairs

    def is_path(loop: Loop) -> bool:
        pairs = newest(loop, loop)
        starts = loop.numbers[: len(loop.numbers) - len(pairs)]  # states before which there is none
        return (
            _in_step(pairs)
            and 2 * len(starts) < len(loop.numbers)
            and not {*starts} & {number for number, _ in pairs}
        )

    def belongs(loop: Loop, path: Loop) -> bool:
        down, up = newest(loop, path), newest(path, loop)
        most = len(loop.sites) - 1  # all but one: of the first or the last, nothing may come
        return (_in_step(down) and len(down) >= most) or (_in_step(up) and len(up) >= most)

    loops = [loop for loop in numbered if is_path(loop)]
    for path in loops:  # grows as it is gone through
        loops += [loop for loop in numbered if loop not in loops and belongs(loop, path)]
    return [loop if loop.numbers[0] < loop.numbers[-1] else _turned(loop) for loop in loops]


def _turned(loop: Loop) -> Loop:
    return Loop(loop.stem, loop.sites[::-1], loop.numbers[::-1])


def _numbered(nodes: Mapping[str, Any], separate: Collection[str]) -> list[Loop]:
    """Sites that may be a loop's by their names, shapes and plates."""
    found: dict[str, dict[int, str]] = {}
    unclear: set[str] = set()
    for name in nodes:
        match = re.fullmatch(r"(.+?)_*(\d+)", name)
        if match is None:
            continue
        stem, number = match[1], int(match[2])
        if number in found.setdefault(stem, {}) or name in separate:
            unclear.add(stem)
        found[stem][number] = name
    loops = []
    for stem, sites in found.items():
        numbers = tuple(sorted(sites))
        loop = Loop(stem, tuple(sites[number] for number in numbers), numbers)
        is_whole = numbers[-1] - numbers[0] == len(numbers) - 1 and len(numbers) >= _FEWEST
        if is_whole and stem not in nodes and stem not in unclear and _are_alike(loop, nodes):
            loops.append(loop)
    return loops


def _in_step(pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether what each depends on moves on by one with its number."""
    return len({newest - number for number, newest in pairs}) == 1


def _dependencies(
    model: Callable[[], Any], nodes: Mapping[str, Any], order: Mapping[str, int]
) -> dict[str, int]:
    """Which sites each of some sites directly depends on, as bits by their places in an order."""
    with apart(), no_validation(), Sources() as sources:
        marks = _MarkSites(order, sources)

        def choose(msg: Message) -> Any:
            return nodes[msg["name"]]["value"] if msg["name"] in nodes else None

        run_with(marks(model), choose)
        return marks.depends


class _MarkSites(Messenger):
    """Notes what the distributions of sites depend on, and marks the sites' values.

    Arguments:
        order: The place of each site in question.
        sources: What follows the operations.
    """

    def __init__(self, order: Mapping[str, int], sources: Sources) -> None:
        super().__init__()
        self.order, self.sources = order, sources
        self.depends: dict[str, int] = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        place = self.order.get(msg["name"])
        if place is None:
            return
        given = torch.as_tensor(msg["value"])
        value = given.clone()  # its memory is its own, and free of what others have noted
        self.sources.mark(value, 0)
        computed = given if is_computed(msg) else msg["fn"].log_prob(value)
        self.depends[msg["name"]] = self.sources.of(computed)
        self.sources.mark(value, 1 << place)
        msg["value"] = value


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
