"""What a model observes, cut into terms that have a log-likelihood of their own.

Each term has an entry for every element of some plates. An observed site is a term of its own.
Observed sites around which local sites were integrated out make one term together, and so do those
that are joined by discrete sites that are summed out: an entry for each element of the plates
around what is integrated, or summed, out. Rows of long data that no local site enters are a term of
their own, under their site's name.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.poutine as poutine
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_hamflow.model.trace import (
    Frames,
    depth_of,
    is_computed,
    log_density,
    plate_shape,
    vectorized_frames,
)
from pyro_hamflow.programs.validation import no_validation


@dataclass(frozen=True)
class Term:
    """Observed sites whose densities are given together.

    Attributes:
        labels: Their names in the original model.
        nodes: Their names in the trace.
        frames: The plates for each element of which there is an entry.
        summed: All sites that are joined by the same discrete sites, if these are summed out.
        entries: Which of the site's entries these are, as indices into the flattened site;
            ``None`` for all.
    """

    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    frames: Frames
    summed: tuple[str, ...] = ()
    entries: Tensor | None = None


def find_terms(trace: poutine.Trace) -> list[Term]:
    """Cuts what a trace observes into terms."""
    observed: dict[str, Any] = {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and site["is_observed"] and not is_computed(site)
    }
    with no_validation():
        components = _components(trace)
    terms: list[Term] = []
    for name in observed:
        joined = next((part for part in components if name in part), (name,))
        nodes = tuple(other for other in observed if other in joined)
        if nodes[0] != name:
            continue
        labels = tuple(dict.fromkeys(label for n in nodes for label in _labels(n, observed)))
        rest = observed[name]["infer"].get("rest") if joined == (name,) else None
        if rest is not None:
            terms.append(Term(labels, nodes, (), entries=rest.reshape(-1).nonzero().flatten()))
            continue
        frames = [set(vectorized_frames(trace.nodes[other])) for other in joined]
        common = sorted(set.intersection(*frames), key=lambda frame: frame.dim)
        if labels:
            summed = tuple(joined) if len(joined) > 1 else ()
            terms.append(Term(labels, nodes, tuple(common), summed))
    return terms


def _labels(name: str, observed: Mapping[str, Any]) -> tuple[str, ...]:
    """The observed sites of the original model that a site stands for.

    Where one of them has rows of its own as well, what is integrated out tells them apart.
    """
    if "estimate" not in observed[name]["infer"]:
        return (name,)
    group = observed[name]["infer"]["estimate"].group
    return group.terms + group.sites if any(t in observed for t in group.terms) else group.terms


def _components(trace: poutine.Trace) -> list[tuple[str, ...]]:
    """Sites that are joined by discrete sites which are summed out."""
    if not any("_enumerate_dim" in s["infer"] for s in trace.nodes.values() if "infer" in s):
        return []
    _pack(trace)
    components: list[tuple[set[str], set[str]]] = []
    for name, site in trace.nodes.items():
        if "log_prob" not in site.get("packed", {}):
            continue
        names, symbols = {name}, _summed(trace).intersection(site["packed"]["log_prob"]._pyro_dims)
        if symbols:
            meeting = [part for part in components if not symbols.isdisjoint(part[1])]
            components = [part for part in components if symbols.isdisjoint(part[1])]
            names = names.union(*(part[0] for part in meeting))
            components.append((names, symbols.union(*(part[1] for part in meeting))))
    return [tuple(name for name in trace.nodes if name in names) for names, _ in components]


def _pack(trace: poutine.Trace) -> None:
    """Gives dimensions the symbols by which Pyro tells plates and enumerated sites apart."""
    trace.compute_log_prob()
    trace.pack_tensors()


def _summed(trace: poutine.Trace) -> set[str]:
    """The symbols of enumerated dimensions."""
    return set(trace.symbol_to_dim) - set(trace.plate_to_symbol.values())


def densities(trace: poutine.Trace, terms: Sequence[Term]) -> list[Tensor]:
    """The log densities of terms' elements, plates at their own dimensions."""
    with no_validation():
        if any(term.summed for term in terms):
            _pack(trace)
        return [_sum_out(trace, term) if term.summed else _own(trace, term) for term in terms]


def _own(trace: poutine.Trace, term: Term) -> Tensor:
    """The log density of a term that discrete sites do not join with others."""
    density = log_density(trace.nodes[term.nodes[0]])
    return density if term.entries is None else density.reshape(-1)[term.entries]


def _sum_out(trace: poutine.Trace, term: Term) -> Tensor:
    """The log density of a term, given all continuous sites, with discrete ones summed out."""
    others = tuple(name for name in term.summed if name not in term.nodes)
    return _contract(trace, term, term.summed) - _contract(trace, term, others)


def _contract(trace: poutine.Trace, term: Term, sites: Sequence[str]) -> Tensor:
    """The log of the sum, over discrete sites, of the product of some sites' densities."""
    tree: OrderedDict[frozenset[str], list[Tensor]] = OrderedDict()
    for name in sites:
        frames = vectorized_frames(trace.nodes[name])
        plates = frozenset(trace.plate_to_symbol[frame.name] for frame in frames)
        tree.setdefault(plates, []).append(trace.nodes[name]["packed"]["log_prob"])
    kept = [trace.plate_to_symbol[frame.name] for frame in term.frames if frame.size > 1]
    result = contract_to_tensor(tree, _summed(trace), target_ordinal=frozenset(kept))
    order = [result._pyro_dims.index(symbol) for symbol in kept]
    return result.permute(order).reshape(plate_shape(term.frames, depth_of(term.frames)))


def given(
    terms: Sequence[Term], values: Sequence[Tensor | None], position: Tensor
) -> tuple[list[Term], list[Tensor]]:
    """The terms that have values, and these with chains and draws first."""
    kept = [(t, v) for t, v in zip(terms, values, strict=True) if v is not None]
    lead = position.shape[:2]
    return [term for term, _ in kept], [value.reshape(lead + value.shape[1:]) for _, value in kept]
