"""Log-likelihoods of single observations, or of what is independent given the parameters.

What a model observes is cut into *terms*, each with an entry for every element of some plates. An
observed site is a term of its own. Observed sites around which local sites were integrated out make
one term together, and so do those that are joined by discrete sites that are summed out: an entry
for each element of the plates around what is integrated, or summed, out.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.poutine as poutine
import torch
from pyro.ops.contract import contract_to_tensor
from torch import Tensor

from pyro_hamflow.model.marginal import MarginalModel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.structure import (
    Frames,
    depth_of,
    is_computed,
    is_latent,
    log_density,
    plate_shape,
    vectorized_frames,
)
from pyro_hamflow.model.validation import no_validation
from pyro_hamflow.results.rows import Rows

WANTED_ERROR = 0.05
MOST_POINTS = 16384
_POINTS = 8  # of the first lattice
_REPLICATES = 8  # of each
_DRAWS = 250  # whose errors are looked at together
_STREAM = 0x9E3779B97F4A7C15  # added to a run's seed, whose own stream the chain has seen


@dataclass(frozen=True)
class Term:
    """Observed sites whose densities are given together.

    Attributes:
        labels: Their names in the original model.
        nodes: Their names in the trace.
        frames: The plates that an entry belongs to an element of.
        summed: All sites that discrete sites join them with, if any do.
    """

    labels: tuple[str, ...]
    nodes: tuple[str, ...]
    frames: Frames
    summed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pointwise:
    """Log-likelihoods at all draws.

    Attributes:
        terms: What they are of.
        values: For each term, of shape ``(chains, draws, *)``.
        error: The largest standard error of an element, a root mean square over the draws;
            ``None`` where nothing is estimated.
        points: From how many points an estimated entry was made, on average.
        notes: What the user should know.
    """

    terms: list[Term]
    values: list[Tensor]
    error: float | None = None
    points: float = 0.0
    notes: list[str] = field(default_factory=list)


def pointwise(
    source: Potential, model: Callable[..., Any], position: Tensor, seed: int | None
) -> Pointwise:
    """The log-likelihood of every term at every draw, estimates from noise of their own.

    Where the likelihood is estimated, the estimates are averaged over fresh noise, until the
    standard error of each element, a root mean square over the draws, is below ``WANTED_ERROR``:
    where it is not, the draws at fault are estimated again from four times as many points, up to
    ``MOST_POINTS``. The logarithm of an average is low by half its variance, which is about .001 at
    that error.

    Arguments:
        source: The potential that the draws are positions of.
        model: The kernel's model, whose estimate is refined if it is a marginal one.
        position: Of shape ``(chains, draws, dimension)``.
        seed: What the noise follows from; the global random state is left alone.
    """
    estimator = _Estimator(source, model, position)
    with torch.random.fork_rng():  # a model with randomness of its own may draw from it
        if not estimator.terms:
            return Pointwise([], [])
        if not estimator.is_noisy:
            results = estimator.exact()
            return Pointwise(*_given(estimator.terms, results, position), notes=estimator.notes())
        generator = torch.Generator().manual_seed((int(seed or 0) + _STREAM) % 2**63)
        parts = [
            estimator.average(draws, generator)
            for draws in torch.arange(len(estimator.position)).split(_DRAWS)
        ]
    values, errors, points = (torch.cat(part) for part in zip(*parts, strict=True))
    by_element = errors.square().mean(0).sqrt()
    error = float(by_element.max())
    notes = estimator.notes()
    if error > WANTED_ERROR:
        many = int((by_element > WANTED_ERROR).sum())
        notes.append(
            f"The log-likelihoods of {many} of {len(by_element)} elements have standard errors "
            f"above {WANTED_ERROR} (up to {error:.2g}), from up to {MOST_POINTS} points a draw: "
            "the model needs another proposal."
        )
    given = _given(estimator.terms, estimator.unflatten(values), position)
    return Pointwise(*given, error, float(points.double().mean()), notes)


def _given(
    terms: Sequence[Term], values: Sequence[Tensor | None], position: Tensor
) -> tuple[list[Term], list[Tensor]]:
    """The terms that have values, and these with chains and draws first."""
    kept = [(t, v) for t, v in zip(terms, values, strict=True) if v is not None]
    lead = position.shape[:2]
    return [term for term, _ in kept], [value.reshape(lead + value.shape[1:]) for _, value in kept]


class _Estimator:
    """Log densities of terms at draws and noise, from few points or many.

    Attributes:
        position: The parameters of all draws, of shape ``(draws, dimension)``.
        terms: What is estimated.
        is_noisy: Whether there is noise to average over.
    """

    def __init__(self, source: Potential, model: Callable[..., Any], position: Tensor) -> None:
        self._source, self._model = source, model
        self._is_refined = isinstance(model, MarginalModel)
        self._points = 1
        if isinstance(model, MarginalModel):
            layouts = model.plan(*source.args, **source.kwargs).layouts.values()
            self._points = max(_POINTS, *(layout.num_particles for layout in layouts))
        self._potentials: dict[int, Potential] = {}
        self._programs: dict[int, Rows] = {}
        potential = self._potential(0)
        self.is_noisy = potential.noise_dimension > 0
        values = source.unravel(position.flatten(0, 1).to(source.example.device))
        empty = position.flatten(0, 1)[:, :0].to(source.example.device)
        parts = [
            values[site.name].reshape(len(empty), site.shape.numel()) for site in potential.sites
        ]
        self.position = torch.cat([empty, *parts], -1)
        trace = potential.trace(self.position[0], _quiet(potential, 1)[0])
        self.terms = find_terms(trace)
        self._shapes = [part.shape for part in densities(trace, self.terms)]

    def exact(self) -> list[Tensor | None]:
        """The log densities where there is no noise."""
        return self._program(0)(self.position, _quiet(self._potential(0), len(self.position)))

    def average(self, draws: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Averages over fresh noise, from as many points as it takes.

        Arguments:
            draws: The numbers of the draws.
            generator: Where noise comes from.

        Returns:
            The logarithms of averages, a row for each draw; their standard errors; and from how
            many points they are.
        """
        value, error = self._replicate(0, draws, generator)
        points = torch.full((len(draws),), _REPLICATES * self._points)
        level = 1
        while (enough := _REPLICATES * self._points * 4**level) <= MOST_POINTS:
            bad = error.square().mean(0).sqrt() > WANTED_ERROR
            todo = (bad & (error > WANTED_ERROR)).any(-1).nonzero().flatten()
            if not len(todo):
                break
            value[todo], error[todo] = self._replicate(level, draws[todo], generator)
            points[todo] = enough
            level += 1
        return value, error, points

    def unflatten(self, values: Tensor) -> list[Tensor]:
        """The entries of each term, from those of all in a row."""
        parts = values.split([shape.numel() for shape in self._shapes], -1)
        return [part.reshape(-1, *s) for part, s in zip(parts, self._shapes, strict=True)]

    def notes(self) -> list[str]:
        """What the user should know of the runs that were made."""
        failures = sum(program.failures for program in self._programs.values())
        if not failures:
            return []
        return [f"The model raised an error in {failures} runs; log-likelihoods are NaN there."]

    def _replicate(
        self, level: int, draws: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """The log of the average of a few estimates of each entry, and its standard error."""
        count = _REPLICATES * (1 if self._is_refined else 4**level)
        potential, program = self._potential(level), self._program(level)
        shape = (len(draws) * count, potential.noise_dimension)
        noise = torch.randn(shape, generator=generator, dtype=self.position.dtype)
        position = self.position[draws.to(self.position.device)].repeat_interleave(count, 0)
        found = program(position, noise.to(position))
        flat = [part.double().reshape(len(part), -1) for part in found if part is not None]
        estimates = torch.cat(flat, -1).reshape(len(draws), count, -1)
        value = estimates.logsumexp(1) - math.log(count)
        relative = (estimates - value[:, None]).exp()
        return value, (relative.std(1) / math.sqrt(count)).nan_to_num(nan=math.inf)

    def _potential(self, level: int) -> Potential:
        """The target, noise apart; each level of a marginal model has four times the points."""
        source, model = self._source, self._model
        level = level if self._is_refined else 0
        if level not in self._potentials:
            if isinstance(model, MarginalModel):
                model = model.refined(self._points * 4**level, "rqmc")
            elif source.separate_noise or not _has_noise(source):
                return source
            self._potentials[level] = Potential(
                model, source.args, source.kwargs, separate_noise=True
            )
        return self._potentials[level]

    def _program(self, level: int) -> Rows:
        """From positions and noise to log densities."""
        level = level if self._is_refined else 0
        if level not in self._programs:
            potential, terms = self._potential(level), self.terms

            def once(position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
                return tuple(densities(potential.trace(position, noise), terms))

            few = self.position[:_DRAWS]
            quiet = _quiet(potential, len(few))
            self._programs[level] = Rows(once, few, quiet, count=_REPLICATES * _DRAWS)
        return self._programs[level]


def _quiet(potential: Potential, rows: int) -> Tensor:
    """Noise to look at a model with."""
    return potential.example.new_full((rows, potential.noise_dimension), 0.1)


def _has_noise(potential: Potential) -> bool:
    return any(
        is_latent(site) and site["infer"].get("noise")
        for site in potential.plain_trace.nodes.values()
    )


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
        labels = tuple(label for node in nodes for label in _labels(node, observed[node]["infer"]))
        frames = [set(vectorized_frames(trace.nodes[other])) for other in joined]
        common = sorted(set.intersection(*frames), key=lambda frame: frame.dim)
        if labels:
            summed = tuple(joined) if len(joined) > 1 else ()
            terms.append(Term(labels, nodes, tuple(common), summed))
    return terms


def _labels(name: str, infer: Mapping[str, Any]) -> tuple[str, ...]:
    """The observed sites of the original model that a site stands for."""
    return infer["estimate"].group.terms if "estimate" in infer else (name,)


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
        return [
            _sum_out(trace, term) if term.summed else log_density(trace.nodes[term.nodes[0]])
            for term in terms
        ]


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
