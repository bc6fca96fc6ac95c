"""Log-likelihoods of single observations, or of what is independent given the parameters.

Estimates come from noise that the chain has not seen: one that was accepted is too high for having
been accepted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.model.marginal import MarginalModel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.structure import is_latent
from pyro_hamflow.results.rows import Rows
from pyro_hamflow.results.terms import Term, densities, find_terms

WANTED_ERROR = 0.05
MOST_POINTS = 1024  # 545 elements with eight visits each take .05 s a draw from half as many
_POINTS = 8  # of the first lattice
_REPLICATES = 8  # of each
_DRAWS = 250  # whose errors are looked at together
_STREAM = 0x9E3779B97F4A7C15  # added to a run's seed, whose own stream the chain has seen


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
