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
the mode: the tails count as far as they matter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor
from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_density import Expansion, Parts, PartsAt, expand
from pyro_hamflow.programs import banded

_STEPS = 100  # of Newton at most
_DAMPED = 1e-2  # of the precision's diagonal, that is added after a step that has failed
_REST = 1e-9  # of the Newton decrement, squared standard deviations for each coordinate
_LIGHTEST = 3.0  # by how much the log mass of another mode may be lower that is told of
_LARGEST_GROWTH = 1.0  # of a log standard deviation, which moves to first order only
_STEP = 1e-4  # of differences, relative to the size of a parameter
_SPREAD = math.sqrt(3.0)  # of the points of Gauss and Hermite, in standard deviations
_CENTRE, _SIDE = 2.0 / 3.0, 1.0 / 6.0  # their weights


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


@dataclass(frozen=True)
class PathGaussian:
    """A Gaussian path.

    Attributes:
        place: Where the density was expanded.
        forward: The root's solution of the gradient there.
        root: The root of the precision.
    """

    place: Tensor
    forward: Tensor
    root: Tensor

    def draw(self, noise: Tensor) -> Tensor:
        """The path that noise of shape ``(*group.shape, n)`` makes."""
        return self.place + banded.solve(self.root, self.forward + noise, transposed=True)


def gaussian_at(fit: PathFit, parts: Parts, parameters: dict[str, Tensor]) -> PathGaussian:
    """The Gaussian approximation for some values of the parameters."""
    place = fit.mode
    if fit.steps == 0:
        return _gaussian(place, expand(parts.prior, place, fit.bands.prior), fit.held)
    shift, deviations = fit.anchor.shift(parameters), fit.deviations
    if shift is not None and fit.slopes is not None:
        place = place + fit.slopes @ shift.to(place)
    if shift is not None and deviations is not None and fit.growth is not None:
        grown = (fit.growth @ shift.to(place)).clamp(-_LARGEST_GROWTH, _LARGEST_GROWTH)
        deviations = deviations * grown.exp()
    for step in range(fit.steps):
        prior = expand(parts.prior, place, fit.bands.prior)
        site = _site(parts, place, fit.bands.likelihood, deviations)
        found = _gaussian(place, prior, site)
        if step < fit.steps - 1:
            place = found.draw(torch.zeros_like(place))
    return found


def _site(parts: Parts, x: Tensor, width: int, deviations: Tensor | None) -> Expansion:
    """The expansion of the likelihood, clamped where it is not concave."""
    if width > 1 or deviations is None:
        found = expand(parts.likelihood, x, width)
        return found if width > 1 else found._replace(bands=found.bands.clamp(min=0.0))
    aside = _SPREAD * deviations
    places = torch.stack([x, x + aside, x - aside])
    at_places = torch.func.vmap(lambda place: tuple(expand(parts.likelihood, place, 1)))(places)
    slope, bands = (_CENTRE * at[0] + _SIDE * (at[1] + at[2]) for at in at_places)
    return Expansion(slope, bands.clamp(min=0.0))


def _gaussian(place: Tensor, prior: Expansion, site: Expansion) -> PathGaussian:
    root = _root(_added(prior.bands, site.bands))
    return PathGaussian(place, banded.solve(root, prior.gradient + site.gradient), root)


def _added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two matrices that may differ in how many bands they have."""
    width = max(first.shape[-1], second.shape[-1])
    wide = [torch.nn.functional.pad(m, (0, width - m.shape[-1])) for m in (first, second)]
    return wide[0] + wide[1]


def _root(bands: Tensor) -> Tensor:
    """The root of a precision, which is made dominated by its diagonal where it has none."""
    if bands.shape[-1] == 1:
        return bands.clamp(min=torch.finfo(bands.dtype).tiny).sqrt()
    defined = banded.log_det(banded.cholesky(bands.detach())).isfinite()
    return banded.cholesky(torch.where(defined[..., None, None], bands, _dominated(bands)))


def _dominated(bands: Tensor) -> Tensor:
    """A matrix with the same entries beside the diagonal, and enough on it to be positive."""
    n, width = bands.shape[-2:]
    least = 1e-6 * bands[..., 0].abs().amax(-1, keepdim=True)
    scale = bands[..., 0].abs().clamp(min=least).sqrt()
    beside = torch.zeros_like(scale)
    for k in range(1, min(width, n)):
        relative = bands[..., k:, k].abs() / (scale[..., k:] * scale[..., :-k])
        beside = beside + torch.nn.functional.pad(relative, (k, 0))
        beside = beside + torch.nn.functional.pad(relative, (0, k))
    diagonal = torch.maximum(bands[..., 0], scale.square() * beside * 1.01 + least)
    return torch.cat([diagonal[..., None], bands[..., 1:]], -1)


def climb(parts: Parts, bands: Bands, x: Tensor) -> Tensor:
    """Finds the mode of each element's joint density by damped Newton steps.

    Arguments:
        parts: The log densities.
        bands: How many bands they have.
        x: Where to begin, of shape ``(*group.shape, n)``.
    """
    damping = torch.full_like(x[..., :1], 1e-6)
    value = (parts.prior(x) + parts.likelihood(x)).detach()
    for _ in range(_STEPS):
        prior = expand(parts.prior, x, bands.prior)
        site = _site(parts, x, bands.likelihood, None)
        precision, slope = _added(prior.bands, site.bands), prior.gradient + site.gradient
        size = precision[..., :1].abs().clamp(min=torch.finfo(x.dtype).tiny)
        damped = torch.cat([precision[..., :1] + damping[..., None] * size, precision[..., 1:]], -1)
        root = _root(damped.detach())
        step = banded.solve_both(root, slope.detach())
        decrement = (slope * step).sum(-1)
        new = x + step
        reached = (parts.prior(new) + parts.likelihood(new)).detach()
        better = reached >= value - 1e-12 * value.abs()
        rests = (decrement <= _REST * x.shape[-1]) & (damping[..., 0] <= _DAMPED)
        damping = torch.where(better[..., None], damping * 0.1, (damping * 10).clamp(min=_DAMPED))
        x = torch.where(better[..., None], new, x).detach()
        value = torch.where(better, reached, value)
        if bool((rests | (damping[..., 0] > 1e8)).all()):
            break
    return x


def other_modes(parts: Parts, bands: Bands, fit: PathFit, starts: list[Tensor]) -> Tensor:
    """Whether paths of other modes weigh about as much as those that were fitted.

    Arguments:
        parts: The log densities at the pilot.
        bands: How many bands they have.
        fit: What was fitted.
        starts: Where to begin searches for other modes.

    Returns:
        For each element, ``(*group.shape)``.
    """

    def at(x: Tensor) -> tuple[Tensor, Tensor]:
        prior, site = expand(parts.prior, x, bands.prior), _site(parts, x, bands.likelihood, None)
        precision = _added(prior.bands, site.bands).detach()
        value = (parts.prior(x) + parts.likelihood(x)).detach()
        return value - 0.5 * banded.log_det(_root(precision)), precision

    mass, precision = at(fit.mode)
    deviations = _deviations(precision)
    found = torch.zeros_like(mass, dtype=torch.bool)
    for start in starts:
        x = climb(parts, bands, start)
        is_other = ((x - fit.mode).abs() > deviations).any(-1)
        found |= is_other & (at(x)[0] > mass - _LIGHTEST)
    return found


def fit_path(
    parts_at: PartsAt,
    anchor: Anchor,
    bands: Bands,
    x: Tensor,
    steps: int,
) -> PathFit:
    """Fits the Gaussian approximation of a path at a pilot value of the parameters.

    Arguments:
        parts_at: The log densities of the path, for given values of the parameters.
        anchor: These values, and which of them the mode is to follow.
        bands: How many bands the densities have.
        x: Where to begin the search for the mode.
        steps: How many expansions of the likelihood each parameter value takes.
    """
    parts = parts_at(anchor.values)
    mode = climb(parts, bands, x)
    prior = expand(parts.prior, mode, bands.prior)
    site = _site(parts, mode, bands.likelihood, None)
    if _is_exact(parts, _gaussian(mode, prior, site)):
        held = Expansion(site.gradient.detach(), site.bands.detach())
        return PathFit(anchor, bands, mode, held, None, None, None, max(steps, 1), True)
    deviations = None
    if bands.likelihood == 1:
        deviations = _deviations(_added(prior.bands, site.bands))
        site = _site(parts, mode, bands.likelihood, deviations)
    held = Expansion(site.gradient.detach(), site.bands.detach())
    slopes, growth = None, None
    if steps and anchor.followed:
        slopes, growth = _slopes(parts_at, anchor, bands, mode)
    return PathFit(anchor, bands, mode, held, deviations, slopes, growth, steps, False)


def _is_exact(parts: Parts, found: PathGaussian) -> bool:
    """Whether paths have the same weight, wherever they are."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noises = [2.0 * torch.randn_like(found.place) for _ in range(4)]
    weights = []
    for noise in noises:
        x = found.draw(noise)
        weights.append(parts.prior(x) + parts.likelihood(x) + 0.5 * noise.square().sum(-1))
    log_weights = torch.stack(weights).detach()
    rounding = 1e4 * torch.finfo(log_weights.dtype).eps * (1.0 + log_weights.abs().max())
    return bool((log_weights.amax(0) - log_weights.amin(0)).max() <= rounding)


def _deviations(precision: Tensor) -> Tensor:
    """The standard deviations that a precision says: the gradient of its log determinant."""
    with torch.enable_grad():
        precision = precision.detach().requires_grad_()
        total = banded.log_det(_root(precision)).sum()
        (slope,) = torch.autograd.grad(total, precision)
    return slope[..., 0].clamp(min=0.0).sqrt()


def _slopes(parts_at: PartsAt, anchor: Anchor, bands: Bands, mode: Tensor) -> tuple[Tensor, Tensor]:
    """How the mode and the log standard deviations move with the parameters, by differences."""

    def newton(parts: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
        prior, site = expand(parts.prior, x, bands.prior), _site(parts, x, bands.likelihood, None)
        precision = _added(prior.bands, site.bands).detach()
        step = banded.solve_both(_root(precision), (prior.gradient + site.gradient).detach())
        return step, _deviations(precision).log()

    sizes = torch.cat([anchor.values[name].abs().reshape(-1) for name in anchor.followed])
    columns = []
    for i, size in enumerate(sizes.tolist()):
        shift = torch.zeros_like(sizes)
        shift[i] = _STEP * max(size, _STEP)
        up, down = (newton(parts_at(anchor.at(side)), mode) for side in (shift, -shift))
        columns.append([(u - d) / (2.0 * shift[i]) for u, d in zip(up, down, strict=True)])
    moves, growths = zip(*columns, strict=True)
    return torch.stack(moves, -1), torch.stack(growths, -1)
