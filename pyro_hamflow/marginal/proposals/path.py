r"""Whole paths, from a Gaussian approximation of their posterior that follows the parameters.

Minus the Hessian of a path's log density has few bands: a state meets those of a few times before.
So a Gaussian path takes time in proportion to its length; :mod:`~pyro_hamflow.marginal.path_fit`
says where it lies. Particles are whole paths, weighed by the path's own prior and likelihood.
Where these are Gaussian, every weight is the likelihood itself, and one particle is exact.

Each coordinate of the noise is stretched, :math:`z + 10^{-4} z^5`, which is next to nothing for
:math:`|z| < 2` and gives the proposal heavier tails than any Gaussian prior: weights are bounded
where the likelihood is. Where the weights do not vary there is nothing to bound, nor to stretch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Self

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor, positive_of
from pyro_hamflow.marginal.gaussian_form import Component
from pyro_hamflow.marginal.noise_layout import Stratum
from pyro_hamflow.marginal.path_bands import find_bands
from pyro_hamflow.marginal.path_covariance import CovarianceParticle, map_at
from pyro_hamflow.marginal.path_density import (
    Order,
    Parts,
    PathCoordinates,
    gradient,
    path_parts,
)
from pyro_hamflow.marginal.path_fit import PathFit, fit_path, gaussian_at
from pyro_hamflow.marginal.path_modes import higher_start, other_modes
from pyro_hamflow.marginal.path_programs import (
    densities_at,
    in_order,
    known_programs,
    made_programs,
    prior_centre,
)
from pyro_hamflow.marginal.path_tails import tail_variance
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.proposals.base import Draw, Particle, Proposal, stretched
from pyro_hamflow.marginal.structure import LONG, Group
from pyro_hamflow.marginal.whitening.affine import CovariancePrior
from pyro_hamflow.model.supports import transform_of
from pyro_hamflow.model.trace import is_latent, plate_shape
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs import banded

_MOST_STEPS = 2  # a third changes next to nothing: Newton's method is there
# How many expansions of the likelihood each way of following the parameters takes.
FOLLOWING = {"prior": 0, "linear": 1, "newton": 2}
_SEARCHES = 4  # for other modes
# Where whitening may draw faster. By effective draws per second of sampling, marginalised and
# whitened: random walks of 60 to 80 counts 92 and 830, 290 and 370; a process at 40 places 820 and
# 1,790, at 100 260 and 365; 500 and 2,000 returns 511 and 354, 148 and 60.
_SHORT = 100
_LONG_FOR_NOISE = 30  # numbers, from which on it is said
_LARGEST_VARIANCE = 4.0  # somewhat above the one for which particles are taken


class PathParticle:
    """One path of every element of a group.

    Arguments:
        coordinates: How it becomes values of sites.
        path: The path, ``(*group.shape, n)``.
        log_density: Of the path under the proposal, ``(*group.shape)``, plates where they are.
    """

    def __init__(self, coordinates: PathCoordinates, path: Tensor, log_density: Tensor) -> None:
        self.coordinates = coordinates
        self.path = path
        self.log_density = log_density

    def draw(self, name: str, fn: Any, noise: Tensor, component: Component | None) -> Draw:
        value, density = self.coordinates.site(name, fn, self.path)
        return Draw(value, (density,))

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        return log_ratios[0] - self.log_density, None


@dataclass(frozen=True)
class PathProposal(Proposal):
    """Whole paths from a Gaussian approximation of their posterior; see the module's text.

    Attributes:
        steps: How many expansions of the likelihood each parameter value takes; none if that of the
            pilot is held.
        is_told: Whether the user has said so, so that it stays.
        fitted: The approximation of each group; none before the fit.
        remark: What it misses, in a sentence.
        misses_modes: Whether these are modes.
    """

    steps: int = 0
    is_told: bool = False
    fitted: Mapping[str, PathFit] = field(default_factory=dict)
    remark: str | None = None
    misses_modes: bool = False
    name = "laplace"
    stratified = False
    enough_particles = 16
    needs_fit = True
    is_comparable = False
    is_final = False
    fades = True

    def noise_shapes(
        self, plan: Plan, group: Group, trace: poutine.Trace, splits: Mapping[str, int | None]
    ) -> dict[str, torch.Size]:
        shapes = {}
        for name in splits:
            fn = trace.nodes[name]["fn"]
            whole = transform_of(name, fn).inverse_shape(fn.shape())
            shapes[name] = torch.Size(whole[len(fn.batch_shape) :])
        return shapes

    def particle(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum,
        coordinates: Tensor,
        parameters: dict[str, Tensor],
        source: Tensor | None,
    ) -> Particle:
        fit = self.fitted.get(group.name)
        if fit is None:
            raise RuntimeError("the proposal is not fitted yet: call `fit` with the model's data")
        path = PathCoordinates(group, plan.layouts[group.name], fit.bands.order)
        parts = self._parts(plan, group, fit, parameters)
        noise, log_stretch = coordinates, torch.zeros_like(coordinates[..., 0])
        if not fit.is_exact:
            noise, log_stretch = stretched(coordinates)
        log_noise = -0.5 * (coordinates.square() + math.log(2.0 * math.pi)).sum(-1) - log_stretch
        shape = plate_shape(group.frames, plan.structure.nesting)
        if fit.by_covariance:
            sites_at = partial(map_at, fit, parts, parameters)
            return CovarianceParticle(path, sites_at, noise, log_noise.reshape(shape))
        found = gaussian_at(fit, parts, parameters)
        density = log_noise + 0.5 * banded.log_det(found.root).reshape(shape)
        return PathParticle(path, found.draw(noise), density)

    def _parts(
        self, plan: Plan, group: Group, fit: PathFit, parameters: dict[str, Tensor]
    ) -> Parts:
        """The log densities of a group's path."""
        programs = known_programs(plan, group, fit.anchor.values)
        if programs is not None and parameters.keys() <= fit.anchor.values.keys():
            return in_order(programs.parts_at, fit.bands.order, parameters)
        path = PathCoordinates(group, plan.layouts[group.name], fit.bands.order)
        return path_parts(plan, path, parameters)

    def tail(self, plan: Plan, parameters: dict[str, Tensor]) -> float:
        found = []
        for group in plan.structure.groups:
            fit = self.fitted[group.name]
            parts = self._parts(plan, group, fit, parameters)
            if fit.by_covariance:
                fn = plan.trace(parameters).nodes[group.sites[0]]["fn"]
                prior = CovariancePrior(fn.loc, fn.scale_tril)
                found.append(tail_variance(fit, map_at(fit, parts, parameters, prior), parts))
            else:
                found.append(tail_variance(fit, gaussian_at(fit, parts, parameters), parts))
        return max(found, default=0.0)

    def fit(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        continuous = set(plan.structure.parameters) - set(plan.structure.placeholders)
        found = self._fitted(plan, pilot, tuple(name for name in pilot if name in continuous))
        missed = found._told_of_modes(plan, pilot)
        told = missed or found._told_of_noise()
        return replace(found, remark=told, misses_modes=missed is not None)

    def follow(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        return self._fitted(plan, pilot, ())

    def _told_of_modes(self, plan: Plan, pilot: Mapping[str, Tensor]) -> str | None:
        """What is said where paths have other modes than the one that was fitted."""
        values = {name: value.detach() for name, value in pilot.items()}
        for group in plan.structure.groups:
            fit = self.fitted[group.name]
            path = PathCoordinates(group, plan.layouts[group.name], fit.bands.order)
            programs = known_programs(plan, group, values)
            assert programs is not None
            starts = [_somewhere(plan, path, values, seed) for seed in range(1, 1 + _SEARCHES)]
            count = int(other_modes(programs.look_at(values), fit.mode, starts).sum())
            if count and not fit.is_exact:
                paths = "the path" if not group.shape else f"{count} paths of {group.shape.numel()}"
                return (
                    f"{paths} of '{group.name}' can lie about several modes, and the Gaussian "
                    "proposal about one of them misses the others: results may be those of this "
                    "mode alone; take a proposal of your own, or `NUTS` on the model as it is."
                )
        return None

    def _told_of_noise(self) -> str | None:
        """What is said where each site is noise of all that comes later."""
        for name, fit in self.fitted.items():
            n = fit.mode.shape[-1]
            if n >= _LONG_FOR_NOISE and fit.bands.likelihood == n and fit.bands.prior == 1:
                return (
                    f"each of the {n} numbers of '{name}' meets all others in the likelihood, like "
                    f"noise that a path is made of, so that an estimate takes {n} times as long as "
                    "it may: write the path itself as the site, as a `pyro.markov` loop or one "
                    "multivariate normal variable, not its noise."
                )
        return None

    def closer(self) -> Self | None:
        if self.is_told:
            return None
        # Some likelihoods take a step in any case.
        taken = max([self.steps, *(fit.steps for fit in self.fitted.values() if not fit.is_exact)])
        return replace(self, steps=taken + 1) if taken < _MOST_STEPS else None

    def alternative(self, sites: Sequence[str], variance: float) -> str | None:
        fits = self.fitted.values()
        longest = max(fit.mode.shape[-1] for fit in fits)
        is_dense = any(LONG <= max(fit.bands[1:]) == fit.mode.shape[-1] for fit in fits)
        is_quiet = longest > _SHORT and variance <= _LARGEST_VARIANCE and not is_dense
        if is_quiet or (all(fit.is_exact for fit in fits) and not is_dense):
            return None
        why = f"has an estimate of variance {variance:.3g}"
        if is_dense or longest <= _SHORT:
            why = "has no bands" if is_dense else "is short"
        return (
            f"the path {list(sites)} {why}: `NUTS(whiten(model, {list(sites)}))`, exact too, has "
            "it as white noise among the parameters, needs no estimate, and may draw faster."
        )

    def _fitted(self, plan: Plan, pilot: Mapping[str, Tensor], followed: tuple[str, ...]) -> Self:
        values = {name: value.detach() for name, value in pilot.items()}
        anchor, positive, fitted = Anchor(values, followed), positive_of(plan, values, followed), {}
        for group in plan.structure.groups:
            name, layout = group.name, plan.layouts[group.name]
            natural = torch.arange(layout.dimension, device=layout.example.device)
            path = PathCoordinates(group, layout, Order(natural))
            somewhere = cache(partial(_somewhere, plan, path, values))
            programs = known_programs(plan, group, values)
            if programs is None:
                of_values = densities_at(plan, path, somewhere(), values)
            else:
                of_values = programs.parts_at
            drawn = {n: plan.structure.values[n] for n in values}
            before = self.fitted.get(name)
            if before is None or len(before.bands.order.places) != layout.dimension:
                there = _somewhere(plan, path, drawn)
                looks = [(of_values(values), somewhere()), (of_values(drawn), there)]
                found = programs.bands if programs else None
                bands, start = find_bands(looks, group, layout, found), None
            else:
                bands, start = before.bands, before.mode
            parts_at = partial(in_order, of_values, bands.order)
            if programs is None or programs.bands is not bands:
                example = bands.order.from_sites(somewhere()) if start is None else start
                programs = made_programs(plan, group, of_values, bands, example, values)
            near, parts = before, parts_at(values)
            if start is None or not bool(gradient(parts.likelihood, start).isfinite().all()):
                start = bands.order.from_sites(somewhere())
                centre = prior_centre(plan, group, programs, start, values)
                near, start = None, higher_start(parts, start, centre)
            steps = self.steps
            if not self.is_told:
                # What is held at the pilot is the likelihood: it had better not hold the path
                # together, nor depend on the parameters, whose chains would then not leave it.
                pull, other = (gradient(parts_at(v).likelihood, start) for v in (values, drawn))
                least = int(bands.likelihood > bands.prior or not torch.allclose(pull, other))
                steps = max(steps, least)
            look_at = programs.look_at
            fit = fit_path(parts_at, look_at, anchor, bands, start, steps, near, positive)
            by_covariance = programs.by_covariance and fit.cells is None
            fitted[name] = replace(fit, by_covariance=by_covariance)
        return replace(self, fitted=fitted)


def _somewhere(
    plan: Plan, path: PathCoordinates, parameters: dict[str, Tensor], seed: int = 0
) -> Tensor:
    """A path from the prior."""
    with random_state_kept():
        torch.manual_seed(seed)
        trace = plan.trace(parameters)
    nodes = {name: trace.nodes[name] for name in path.group.sites}
    assert all(map(is_latent, nodes.values()))
    return path.collect({name: (node["fn"], node["value"]) for name, node in nodes.items()})
