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

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.marginal.fitted import Anchor
from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_density import Expansion, Parts, PartsAt, expand
from pyro_hamflow.marginal.path_modes import (
    Look,
    LookAt,
    added,
    climb,
    deviations_of,
    site_at,
)
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs import banded

_LARGEST_GROWTH = 1.0  # of a log standard deviation, which moves to first order only
_STEP = 1e-4  # of differences, relative to the size of a parameter


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
) -> PathFit:
    """Fits the Gaussian approximation of a path at a pilot value of the parameters.

    Arguments:
        parts_at: The log densities of the path, for given values of the parameters.
        look_at: The joint one to second order.
        anchor: These values, and which of them the mode is to follow.
        bands: How many bands the densities have.
        x: Where to begin the search for the mode.
        steps: How many expansions of the likelihood each parameter value takes.
    """
    parts = parts_at(anchor.values)
    mode = climb(look_at(anchor.values), x)
    prior = expand(parts.prior, mode, bands.prior)
    site = site_at(parts, mode, bands.likelihood, None)
    if _is_exact(parts, _gaussian(mode, prior, site)):
        held = Expansion(site.gradient.detach(), site.bands.detach())
        return PathFit(anchor, bands, mode, held, None, None, None, max(steps, 1), True)
    deviations = None
    if bands.likelihood == 1:
        deviations = deviations_of(added(prior.bands, site.bands))
        site = site_at(parts, mode, bands.likelihood, deviations)
    held = Expansion(site.gradient.detach(), site.bands.detach())
    slopes, growth = None, None
    if steps and anchor.followed:
        slopes, growth = _slopes(look_at, anchor, mode)
    return PathFit(anchor, bands, mode, held, deviations, slopes, growth, steps, False)


def _is_exact(parts: Parts, found: PathGaussian) -> bool:
    """Whether paths have the same weight, wherever they are."""
    with random_state_kept():
        torch.manual_seed(0)
        noises = [2.0 * torch.randn_like(found.place) for _ in range(4)]
    weights = []
    for noise in noises:
        x = found.draw(noise)
        weights.append(parts.prior(x) + parts.likelihood(x) + 0.5 * noise.square().sum(-1))
    log_weights = torch.stack(weights).detach()
    rounding = 1e4 * torch.finfo(log_weights.dtype).eps * (1.0 + log_weights.abs().max())
    return bool((log_weights.amax(0) - log_weights.amin(0)).max() <= rounding)


def _slopes(look_at: LookAt, anchor: Anchor, mode: Tensor) -> tuple[Tensor, Tensor]:
    """How the mode and the log standard deviations move with the parameters, by differences."""

    def newton(look: Look) -> tuple[Tensor, Tensor]:
        step = banded.solve_both(banded.nearest_root(look.precision), look.slope)
        return step, deviations_of(look.precision).log()

    sizes = torch.cat([anchor.values[name].abs().reshape(-1) for name in anchor.followed])
    columns = []
    for i, size in enumerate(sizes.tolist()):
        shift = torch.zeros_like(sizes)
        shift[i] = _STEP * max(size, _STEP)
        up, down = (newton(look_at(anchor.at(side))(mode)) for side in (shift, -shift))
        columns.append([(u - d) / (2.0 * shift[i]) for u, d in zip(up, down, strict=True)])
    moves, growths = zip(*columns, strict=True)
    return torch.stack(moves, -1), torch.stack(growths, -1)
