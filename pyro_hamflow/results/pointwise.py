"""Log-likelihoods of single observations, or of what is independent given the parameters.

Estimates come from noise that the chain has not seen: one that was accepted is too high for having
been accepted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.proposals.path import PathProposal
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.trace import is_latent
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.results.moved import MovedPoints, gather, movable
from pyro_hamflow.results.rows import Replicates, Rows
from pyro_hamflow.results.terms import Term, densities, find_terms, given

WANTED_ERROR = 0.05
MOST_POINTS = 1024
_POINTS = 8  # of the first lattice
_REPLICATES = 4  # of each
_DOUBT = 5.0  # of four estimates, the error looks so many times too small once in a hundred draws
_DRAWS = 250  # whose errors are looked at together
_NUMBERS = 2**26  # of noise, made at once: half a GiB
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


def pointwise(source: Potential, model: Model, position: Tensor, seed: int | None) -> Pointwise:
    """The log-likelihood of every term at every draw, estimates from noise of their own.

    Estimates are averaged over fresh noise, until the standard error of each element, a root mean
    square over the draws, is below ``WANTED_ERROR``: where it is not, elements at fault are
    estimated again, first by points moved to where their weights are, then from four times as many,
    up to ``MOST_POINTS``. Only draws beyond doubt are left out: to leave out all whose error looks
    small would keep those that do by chance, which are mostly too low. The logarithm of an average
    is low by half its variance, which is about .001 at that error.

    Arguments:
        source: The potential that the draws are positions of.
        model: The kernel's model, whose estimate is refined if it is a marginal one.
        position: Of shape ``(chains, draws, dimension)``.
        seed: What the noise follows from; the global random state is left alone.
    """
    estimator = _Estimator(source, model, position)
    with random_state_kept():  # a model with randomness of its own may draw from it
        if not estimator.terms:
            return Pointwise([], [])
        if not estimator.is_noisy:
            results = estimator.exact()
            return Pointwise(*given(estimator.terms, results, position), notes=estimator.notes())
        generator = torch.Generator().manual_seed((int(seed or 0) + _STREAM) % 2**63)
        parts = [
            estimator.average(draws, generator)
            for draws in torch.arange(len(estimator.position), device="cpu").split(_DRAWS)
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
    found = given(estimator.terms, estimator.unflatten(values), position)
    return Pointwise(*found, error, float(points.double().mean()), notes)


class _Estimator:
    """Log densities of terms at draws and noise, from few points or many.

    Attributes:
        position: The parameters of all draws, of shape ``(draws, dimension)``.
        terms: What is estimated.
        is_noisy: Whether there is noise to average over.
    """

    def __init__(self, source: Potential, model: Model, position: Tensor) -> None:
        self._source = source
        self._points = 1
        self._models: tuple[MarginalModel, ...] = ()
        self._moved: dict[int, MovedPoints] = {}
        self._programs: dict[int, Rows] = {}
        self._over: Replicates | None = None
        self._plain = source
        if isinstance(model, MarginalModel):
            layouts = model.plan(*source.args, **source.kwargs).layouts.values()
            self._points = max(_POINTS, *(layout.num_particles for layout in layouts))
            is_path = isinstance(model.proposal, PathProposal)
            few = max(layout.dimension for layout in layouts) <= _REPLICATES * self._points
            if few and not is_path:  # as few as points can tell a covariance of
                self._models = movable(source, model, self._points)
                self._plain = self._moved_points(0).potential
            else:  # what a path's Gaussian lacks is skewness, which cancels in pairs
                refined = model.refined(self._points, "antithetic" if is_path else "iid")
                self._plain = Potential(refined, source.args, source.kwargs, separate_noise=True)
        elif not source.separate_noise and _has_noise(source):
            self._plain = Potential(model, source.args, source.kwargs, separate_noise=True)
        self.is_noisy = self._plain.noise_dimension > 0
        values = source.unravel(position.flatten(0, 1).to(source.example.device))
        empty = position.flatten(0, 1)[:, :0].to(source.example.device)
        parts = [
            values[site.name].reshape(len(empty), site.shape.numel()) for site in self._plain.sites
        ]
        self.position = torch.cat([empty, *parts], -1)
        trace = self._plain.trace(self.position[0], _quiet(self._plain, 1)[0])
        self.terms = find_terms(trace)
        self._shapes = [part.shape for part in densities(trace, self.terms)]

    def exact(self) -> list[Tensor | None]:
        """The log densities where there is no noise."""
        return self._program(0)[0](self.position, _quiet(self._plain, len(self.position)))

    def average(self, draws: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Averages over fresh noise, from as many points as it takes.

        Arguments:
            draws: The numbers of the draws.
            generator: Where noise comes from.

        Returns:
            The logarithms of averages, a row for each draw; their standard errors; and from how
            many points they are.
        """
        value, error, places = self._replicate(0, draws, [], generator)
        points = value.new_full(value.shape, self._count(0), dtype=torch.long)
        level = 1
        while self._count(level) <= MOST_POINTS:
            by_element = error.square().mean(0).sqrt()
            bad = (by_element > WANTED_ERROR) & (error > WANTED_ERROR / _DOUBT)
            if not bool(bad.any()):
                break
            # Where a proposal fits badly, errors are found too small at single draws. So points are
            # moved at all of them, which takes as long as the first level has, and no longer.
            moves = bool(self._models) and level == 1
            todo = (bad.any(-1) | moves).nonzero().flatten()
            found = self._replicate(level, draws[todo], [p[todo] for p in places], generator)
            new = by_element > WANTED_ERROR / 2
            value[todo] = torch.where(new, found[0], value[todo])
            error[todo] = torch.where(new, found[1], error[todo])
            points[todo] = torch.where(new, self._count(level), points[todo])
            for old, better in zip(places, found[2], strict=True):
                old[todo] = better
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

    def _growth(self, level: int) -> int:
        """By how much a level has more points than the first; the second moves them, no more."""
        return 4 ** (max(level - 1, 0) if self._models else level)

    def _count(self, level: int) -> int:
        """From how many points a level estimates an entry."""
        return _REPLICATES * self._points * self._growth(level)

    def _replicate(
        self, level: int, draws: Tensor, places: list[Tensor], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Averages of a few estimates of each entry, of as many draws at once as noise allows.

        Arguments:
            level: Of the points.
            draws: The numbers of the draws.
            places: Where the points of each draw lie; none on the first level.
            generator: Where noise comes from.

        Returns:
            Their logarithms; their standard errors; and where points lie best by them.
        """
        count = _REPLICATES * (1 if self._models else self._growth(level))
        numbers = count * max(1, self._program(level)[1])
        blocks = [part.split(max(1, _NUMBERS // numbers)) for part in (draws, *places)]
        parts = [
            self._average_of(count, level, block, others, generator)
            for block, *others in zip(*blocks, strict=True)
        ]
        values, errors, moments = zip(*parts, strict=True)
        joined = [torch.cat(part) for part in zip(*moments, strict=True)]
        return torch.cat(values), torch.cat(errors), joined

    def _average_of(
        self,
        count: int,
        level: int,
        draws: Tensor,
        places: list[Tensor],
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Averages of that many estimates of each entry; else as :meth:`_replicate`."""
        program, noise_dimension = self._program(level)
        shape = (len(draws) * count, noise_dimension)
        noise = torch.randn(shape, generator=generator, dtype=self.position.dtype, device="cpu")
        rows = [self.position[draws.to(self.position.device)], noise.to(self.position), *places]
        if self._models:
            rows[0], *rows[2:] = (
                row.to(rows[0].device).repeat_interleave(count, 0) for row in (rows[0], *places)
            )
        else:  # a draw with all its noises is one row
            rows[1] = rows[1].reshape(len(draws), count, noise_dimension)
        found = program(*rows)
        flat = [
            part.double().reshape(len(draws) * count, -1)
            for part in found[: len(self.terms)]
            if part is not None
        ]
        estimates = torch.cat(flat, -1).reshape(len(draws), count, -1)
        value = estimates.logsumexp(1) - math.log(count)
        relative = (estimates - value[:, None]).exp()
        error = (relative.std(1) / math.sqrt(count)).nan_to_num(nan=math.inf)
        moments = [
            part.unflatten(0, (len(draws), count))
            for part in found[len(self.terms) :]
            if part is not None
        ]
        return value, error, gather(moments)

    def _program(self, level: int) -> tuple[Rows, int]:
        """From positions, noise and places to log densities and moments; the noise's dimension."""
        few, terms, key = self.position[:_DRAWS], self.terms, level if self.is_noisy else 0
        size, places = self._plain.noise_dimension, list[Tensor]()
        count = _REPLICATES * _DRAWS
        run: Program = self._densities
        shape: tuple[int, ...] = (len(few), size)
        if self._models:
            moved = self._moved_points(level)
            size, run = moved.shift_dimension, partial(moved.run, terms)
            shape, places = (len(few), size), moved.examples(len(few)) if level else []
        elif self.is_noisy:
            shape, count = (len(few), _REPLICATES * self._growth(level), size), _DRAWS
            run = self._over = self._over or Replicates(
                run, few, few.new_full((len(few), size), 0.1)
            )
        if key not in self._programs:
            self._programs[key] = Rows(run, few, few.new_full(shape, 0.1), *places, count=count)
        return self._programs[key], size

    def _densities(self, position: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        return tuple(densities(self._plain.trace(position, noise), self.terms))

    def _moved_points(self, level: int) -> MovedPoints:
        if level not in self._moved:
            model = self._models[min(level, 1)]
            self._moved[level] = MovedPoints(
                self._source, model, self._points * self._growth(level)
            )
        return self._moved[level]


def _quiet(potential: Potential, rows: int) -> Tensor:
    """Noise to look at a model with."""
    return potential.example.new_full((rows, potential.noise_dimension), 0.1)


def _has_noise(potential: Potential) -> bool:
    return any(
        is_latent(site) and site["infer"].get("noise")
        for site in potential.plain_trace.nodes.values()
    )
