r"""Gaussian approximations of a path's posterior, and how they follow the parameters.

The path's log joint density is expanded to second order: that of its prior, and that of the
likelihood, whose curvature is a Gaussian *site*. The precision of the proposal is the sum of both.
Where the expansion is made, it may

- be *held*: the mode at the pilot, and with it the gradient and curvature of the likelihood there,
  so that only the prior is expanded anew for other parameter values;
- move with the parameters to first order, by the implicit function theorem;
- take a Newton step from there.

A curvature is clamped where the likelihood is not concave. A likelihood that looks at each state
alone is averaged over the state's posterior, at three points of it, in place of being expanded at
the mode: the tails count as far as they matter. A density with kinks
(:mod:`~pyro_hamflow.marginal.path_kinks`) is always averaged, about a path that stays: there, means
of gradients are smooth in the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor
from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_density import Expansion, Parts, PartsAt, expand
from pyro_hamflow.marginal.path_kinks import CLOSELY, COARSELY, Cells, Kinks, come_to_rest
from pyro_hamflow.marginal.path_looks import LookAt, PathGaussian, PathMap, added, deviations_of
from pyro_hamflow.marginal.path_modes import climb, expand_about, find_kinks, site_at
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs import banded

_LARGEST_GROWTH = 1.0  # of a log standard deviation, which moves to first order only
_STEP = 1e-4  # of differences, relative to the size of a parameter
_FAR_STEP = 0.05  # the same, of means that come to rest by rounds
_ASIDE = 0.2  # of a logarithm, by which a parameter is moved to see how the mode moves
_NOISES = 4  # that tell whether paths have the same weight
_MISSED = 1.0  # by which it is missed then, the sum of squared deviations, if that matters


@dataclass(frozen=True)
class PathFit:
    """What was found of one path at the pilot.

    Attributes:
        anchor: The parameter values there, and which of them the mode follows.
        bands: The order of coordinates, and how many bands there are.
        mode: Where the joint density is highest there, ``(*group.shape, n)``.
        held: The expansion of the likelihood there.
        deviations: The posterior's standard deviations; none where the likelihood is not averaged.
        slopes: How the mode moves, ``(*group.shape, n, parameters)``; none while it stays.
        growth: How the logarithms of the standard deviations move, of the same shape.
        steps: How many expansions of the likelihood a parameter value takes.
        is_exact: Whether the joint density is Gaussian, so that all paths have the same weight.
        kinks: Which of the log densities have kinks.
        cells: Where gradients of these are taken; none without kinks.
        by_covariance: Whether the prior is one multivariate normal, whose covariance serves as it
            is (:mod:`~pyro_hamflow.marginal.path_covariance`).
    """

    anchor: Anchor
    bands: Bands
    mode: Tensor
    held: Expansion
    deviations: Tensor | None
    slopes: Tensor | None
    growth: Tensor | None
    steps: int
    is_exact: bool
    kinks: Kinks = Kinks(prior=False, likelihood=False)
    cells: Cells | None = None
    by_covariance: bool = False

    def moved(self, parameters: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The mode and the deviations for values of the parameters, to first order."""
        place, deviations, shift = self.mode, self.deviations, self.anchor.shift(parameters)
        if shift is not None and self.slopes is not None:
            place = place + self.slopes @ shift.to(place)
        if shift is not None and deviations is not None and self.growth is not None:
            grown = (self.growth @ shift.to(place)).clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH)
            deviations = deviations * grown.exp()
        return place, deviations


def gaussian_at(fit: PathFit, parts: Parts, parameters: dict[str, Tensor]) -> PathGaussian:
    """The Gaussian approximation for some values of the parameters."""
    if fit.steps == 0:
        return _gaussian(fit.mode, expand(parts.prior, fit.mode, fit.bands.prior), fit.held)
    place, deviations = fit.moved(parameters)
    for step in range(fit.steps):
        if fit.cells is not None and deviations is not None:
            prior, site = expand_about(parts, place, deviations, fit.bands, fit.kinks, fit.cells)
        else:
            prior = expand(parts.prior, place, fit.bands.prior)
            site = site_at(parts, place, fit.bands.likelihood, deviations)
        found = _gaussian(place, prior, site)
        if step < fit.steps - 1:
            place = found.draw(torch.zeros_like(place))
    return found


def _gaussian(place: Tensor, prior: Expansion, site: Expansion) -> PathGaussian:
    root = banded.nearest_root(added(prior.bands, site.bands))
    return PathGaussian(place, banded.solve(root, prior.gradient + site.gradient), root)


def fit_path(
    parts_at: PartsAt,
    look_at: LookAt,
    anchor: Anchor,
    bands: Bands,
    x: Tensor,
    steps: int,
    near: PathFit | None = None,
    positive: Collection[str] = (),
) -> PathFit:
    """Fits the Gaussian approximation of a path at a pilot value of the parameters.

    Arguments:
        parts_at: The log densities of the path, for given values of the parameters.
        look_at: The joint one to second order.
        anchor: These values, and which of them the mode is to follow.
        bands: How many bands the densities have.
        x: Where to begin the search for the mode.
        steps: How many expansions of the likelihood each parameter value takes.
        near: What was found at parameter values close by.
        positive: Which of the parameters that are followed are positive.
    """
    if near is not None and near.cells is not None:
        return _fit_about(parts_at, anchor, bands, near.cells, max(steps, 1), near.kinks)
    parts, look = parts_at(anchor.values), look_at(anchor.values)
    mode = climb(look, x)
    mode = torch.where(mode.isfinite(), mode, x)  # where nothing tells of curvature
    here = look(mode)
    site = site_at(parts, mode, bands.likelihood, None)
    if _is_exact(parts, here.gaussian(mode), mode):
        held = Expansion(site.gradient.detach(), site.bands.detach())
        return PathFit(anchor, bands, mode, held, None, None, None, max(steps, 1), True)
    farthest = torch.maximum((x - mode).abs().max(), x.square().mean().sqrt())
    spread = here.deviations()
    cells = Cells(mode, torch.minimum(spread.nan_to_num(nan=math.inf), farthest))
    kinks = find_kinks(parts, cells, bands)
    if kinks.any:
        return _fit_about(parts_at, anchor, bands, cells, max(steps, 1), kinks)
    deviations = None
    if bands.likelihood == 1:
        deviations = spread
        site = site_at(parts, mode, bands.likelihood, deviations)
    held = Expansion(site.gradient.detach(), site.bands.detach())
    slopes, growth = None, None
    if steps and anchor.followed:
        slopes, growth = _slopes(look_at, anchor, mode)
        anchor = replace(anchor, ratios=_ratios(look_at, anchor, mode, slopes, positive, spread))
        slopes, growth = anchor.by_ratios(slopes), anchor.by_ratios(growth)
    return PathFit(anchor, bands, mode, held, deviations, slopes, growth, steps, False)


def _fit_about(
    parts_at: PartsAt, anchor: Anchor, bands: Bands, start: Cells, steps: int, kinks: Kinks
) -> PathFit:
    """What :func:`fit_path` finds of densities with kinks, where gradients are taken at first."""

    def rest(parameters: dict[str, Tensor], place: Cells, cells: Cells | None = None) -> Cells:
        """Where the path's Gaussian comes to rest, with cells there or where they are."""
        parts = parts_at(parameters)

        def site(place: Cells) -> tuple[Tensor, Tensor]:
            prior, site = expand_about(parts, *place, bands, kinks, cells or place)
            matrix = added(prior.bands, site.bands)
            pull = prior.gradient + site.gradient
            return matrix, pull + banded.multiply(matrix, place.centre)

        return come_to_rest(site, _moments, place, CLOSELY if cells else COARSELY)

    place = rest(anchor.values, start)
    _, site = expand_about(parts_at(anchor.values), *place, bands, kinks, place)
    slopes, growth = None, None
    # Where several states move, gradients at the others' own places would be needed.
    if anchor.followed and bands.likelihood == 1 and not kinks.prior:

        def at(shift: Tensor) -> tuple[Tensor, Tensor]:
            moved = rest(anchor.at(shift), place, place)
            return moved.centre, moved.spread.log()

        slopes, growth = _differences(at, anchor, _FAR_STEP)
    held = Expansion(site.gradient.detach(), site.bands.detach())
    return PathFit(
        anchor, bands, place.centre, held, place.spread, slopes, growth, steps, False, kinks, place
    )


def _moments(precision: Tensor, linear: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and the deviations of a Gaussian."""
    mean = banded.solve_both(banded.nearest_root(precision), linear)
    return mean, deviations_of(precision)


def _is_exact(parts: Parts, found: PathMap, like: Tensor) -> bool:
    """Whether paths have the same weight, wherever they are."""
    with random_state_kept():
        torch.manual_seed(0)
        noises = 2.0 * torch.stack([torch.randn_like(like) for _ in range(_NOISES)])

    def log_weight(noise: Tensor) -> Tensor:
        x = found.draw(noise)
        return parts.prior(x) + parts.likelihood(x) + 0.5 * noise.square().sum(-1)

    log_weights = torch.func.vmap(log_weight)(noises).detach()
    rounding = 1e4 * torch.finfo(log_weights.dtype).eps * (1.0 + log_weights.abs().max())
    return bool((log_weights.amax(0) - log_weights.amin(0)).max() <= rounding)


def _slopes(look_at: LookAt, anchor: Anchor, mode: Tensor) -> tuple[Tensor, Tensor]:
    """How the mode and the log standard deviations move with the parameters, by differences."""
    whole = torch.zeros_like(mode[..., 0])

    def at(shift: Tensor) -> tuple[Tensor, Tensor]:
        look = look_at(anchor.at(shift))(mode)
        return look.step(whole), look.deviations().log()

    return _differences(at, anchor, _STEP)


def _ratios(
    look_at: LookAt,
    anchor: Anchor,
    mode: Tensor,
    slopes: Tensor,
    positive: Collection[str],
    spread: Tensor,
) -> frozenset[str]:
    """The positive parameters whose logarithms the mode follows better, where that matters.

    Seen some way off, where two steps of Newton's method from here are at the mode. With yields of
    bonds, whose risk is a product of powers of scales, estimates of one particle had variances up
    to 85 over the posterior by the scales themselves, and .3 by their logarithms.
    """
    whole, found = torch.zeros_like(mode[..., 0]), set[str]()
    columns = dict(zip(anchor.followed, slopes.split(anchor.sizes, -1), strict=True))
    for name in positive:
        value, misses = anchor.values[name], [0.0, 0.0]
        along = columns[name] @ value.reshape(-1).to(slopes)
        for step in (_ASIDE, -_ASIDE):
            look, place = look_at(anchor.values | {name: value * math.exp(step)}), mode
            for _ in range(2):
                place = place + look(place).step(whole)
            for i, size in enumerate((step, math.expm1(step))):
                miss = (place - mode - size * along) / spread
                misses[i] += float(miss.square().sum())
        if misses[0] < misses[1] and misses[1] > _MISSED:
            found.add(name)
    return frozenset(found)


def _differences(
    at: Callable[[Tensor], tuple[Tensor, Tensor]], anchor: Anchor, step: float
) -> tuple[Tensor, Tensor]:
    """The slopes of two results in the followed parameters, as their last dimension."""
    sizes = torch.cat([anchor.values[name].abs().reshape(-1) for name in anchor.followed])
    columns = []
    for i, size in enumerate(sizes.tolist()):
        shift = torch.zeros_like(sizes)
        shift[i] = step * max(size, step)
        pairs = zip(at(shift), at(-shift), strict=True)
        columns.append([(up - down) / (2.0 * shift[i]) for up, down in pairs])
    moves, growths = zip(*columns, strict=True)
    return torch.stack(moves, -1), torch.stack(growths, -1)
