r"""Log densities with kinks, whose second derivative says nothing.

That of a Laplace distribution is linear on either side of its location, so that its second
derivative is zero wherever there is one; so are hinges, rectified lines and absolute values. What
tells their curvature are gradients at points about a place. Where x has mean m and standard
deviation :math:`\sigma`,

.. math:: \mathrm E[-\ell''(x)] = -\mathrm E[\ell'(m + \sigma z) \, z] / \sigma

for standard normal z, and the right side is there with kinks, too. It is the curvature of the
Gaussian that agrees with :math:`\ell` best where x mostly is. Gradients are taken as constant in
cells whose places stay: so both means are smooth in m and :math:`\sigma`.

The same means serve a prior with heavy tails, as of steps by Student's t: its second derivative at
the mode is that of its narrow middle, and by that a path hardly ever goes where some of its steps
are large.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_hamflow.programs import banded

_CELLS, _FARTHEST = 13, 1.85  # to 3.1 deviations, wider spaced far out, where mean may move
_NOTHING = 1e-6  # of the posterior's precision: a second derivative that says nothing
_FELT = 1e-2  # of the posterior's precision: a curvature that matters
# What gradients tell of a second derivative, below which it misleads: .97 where a prior is Gaussian
# and .98 where it is a smooth map's, .44 for steps by Student's t of 3 degrees and .69 of 10.
_STEEP = 0.75
_ROUNDS = 50  # of means and deviations at most
_RATE = 0.5  # of what a round finds: all of it may lead to and fro
_FLAT = 1e-6  # of how gradients differ, below which there is no curvature
_FAR = 6.0  # times the size of a path's states: kinks may be anywhere
COARSELY, CLOSELY = 0.05, 1e-4  # deviations, where cells move and where they stay
_DRAWS = 32  # sets of coordinates that are moved

Slope = Callable[[Tensor], Tensor]  # from a path to the gradient of its log density
Slopes = Callable[[Tensor], Tensor]  # the same of several paths, ``(count, *batch, n)``


class Cells(NamedTuple):
    """Where gradients are taken: each counts for all of a cell about it.

    Attributes:
        centre: A path, ``(*batch, n)``.
        spread: How far states are from it, of the same shape.
    """

    centre: Tensor
    spread: Tensor

    def points(self) -> Tensor:
        """The places of each state, ``(cells, *batch, n)``."""
        aside = torch.linspace(-_FARTHEST, _FARTHEST, _CELLS).to(self.centre).sinh()
        aside = aside.reshape(-1, *[1] * self.centre.dim())
        return self.centre + self.spread * aside

    def masses(self, mean: Tensor, deviations: Tensor) -> tuple[Tensor, Tensor]:
        """The share of each cell in a normal distribution, and the mean of z in it times that."""
        points = self.points()
        bounds = (0.5 * (points[1:] + points[:-1]) - mean) / deviations
        below = torch.special.ndtr(bounds)
        density = torch.exp(-0.5 * bounds.square()) / math.sqrt(2.0 * math.pi)
        none = torch.zeros_like(below[:1])
        below = torch.cat([none, below, none + 1.0])
        density = torch.cat([none, density, none])
        return below.diff(dim=0), -density.diff(dim=0)


def about(
    slopes: Slopes, cells: Cells, mean: Tensor, deviations: Tensor, width: int
) -> tuple[Tensor, Tensor]:
    """The mean gradient of a log density about a path, and the bands that gradients tell.

    Both are smooth in the mean and the deviations, for the gradients' places stay where they are.

    Arguments:
        slopes: The density's gradients at several paths, ``(count, *batch, n)``.
        cells: Where gradients are taken.
        mean: The path, ``(*batch, n)``.
        deviations: How far states are from it, of the same shape.
        width: How many lower bands the matrix has, the diagonal included.

    Returns:
        Tensors of shape ``(*batch, n)`` and ``(*batch, n, width)``.
    """
    marks = banded.probes(mean, width).bool()
    marks = marks.reshape(len(marks), 1, *[1] * (mean.dim() - 1), -1)
    places = torch.where(marks, cells.points(), cells.centre)  # (probes, cells, *batch, n)
    found = slopes(places.flatten(0, 1)).unflatten(0, places.shape[:2])
    seen = banded.bands_seen(found, width)  # each state's gradient, by the states that move
    shares, moments = cells.masses(mean, deviations)
    weights = moments / deviations
    moved = [pad(weights[..., : weights.shape[-1] - k], (k, 0)) for k in range(width)]
    bands = -(seen * torch.stack(moved, -1)).sum(0)
    return (seen[..., 0] * shares).sum(0), bands


def come_to_rest(
    site: Callable[[Cells], tuple[Tensor, Tensor]],
    moments: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    place: Cells,
    within: float,
) -> Cells:
    """The mean and deviations of a path about which its density agrees with a Gaussian.

    Arguments:
        site: The precision and the linear term that the density has about a mean with deviations.
        moments: The mean and the deviations of the Gaussian with these.
        place: Where to begin.
        within: How many deviations the last step may have; where cells move, steps do not get
            much smaller than these are.
    """
    precision, linear = site(place)
    for _ in range(_ROUNDS):
        (x, spread), (mean, deviations) = place, moments(precision, linear)
        step = (mean - x).clamp(-spread, spread)  # as far as gradients were taken
        deviations = torch.maximum(deviations, 0.5 * spread)
        place = Cells((x + step).detach(), deviations.detach())
        change = torch.maximum(step.abs(), (deviations - spread).abs())
        if bool((change <= within * deviations).all()):
            break
        terms = zip((precision, linear), site(place), strict=True)
        precision, linear = (torch.lerp(old, new, _RATE) for old, new in terms)
    return place


class Kinks(NamedTuple):
    """Which log densities of a path have kinks, or a prior's heavy tails."""

    prior: bool
    likelihood: bool

    @property
    def any(self) -> bool:
        """Whether one of them has."""
        return self.prior or self.likelihood


def is_flat(bands: Tensor, deviations: Tensor) -> Tensor:
    """For which states second derivatives say nothing, as they do where there may be a kink."""
    return bands[..., 0].abs() * deviations.square() < _NOTHING


def has_kinks(bands: Tensor, told: Tensor, deviations: Tensor) -> bool:
    """Whether second derivatives say nothing where gradients tell of a curvature.

    Arguments:
        bands: Lower bands by second derivatives, ``(*batch, n, width)``.
        told: Those by gradients.
        deviations: Of the posterior, ``(*batch, n)``.
    """
    felt = told[..., 0] * deviations.square() > _FELT
    return bool((felt & is_flat(bands, deviations)).any())


def is_steep(bands: Tensor, told: Tensor, deviations: Tensor) -> bool:
    """Whether second derivatives say much more than gradients, as in the middle of heavy tails.

    A Gaussian with this curvature is too narrow: its weights are largest where it hardly ever goes.

    Arguments:
        bands: Lower bands by second derivatives, ``(*batch, n, width)``.
        told: Those by gradients.
        deviations: Of the posterior, ``(*batch, n)``.
    """
    exact = bands[..., 0]
    felt = exact * deviations.square() > _FELT
    return bool((felt & (told[..., 0] < _STEEP * exact)).any())


def differ_without_curvature(slopes: Tensor, products: Tensor, size: Tensor) -> bool:
    """Whether gradients differ between two places at both of which there is no curvature.

    Arguments:
        slopes: The gradients there, ``(2, *batch, n)``.
        products: The second derivatives' products with some directions, ``(count, *batch, n)``.
        size: How far apart the places are.
    """
    change, curvature = (slopes[0] - slopes[1]).abs(), products.abs().amax(0)
    matters = change > _FLAT * slopes.abs().amax()
    return bool((matters & (curvature * size < _FLAT * change)).any())


def elsewhere(x: Tensor) -> Tensor:
    """A path far from another one, so that many kinks lie between the two."""
    return x + _FAR * x.square().mean().sqrt() * torch.randn_like(x)


def reaches(slope: Slope, x: Tensor, other: Tensor, width: int) -> bool:
    """Whether a state's gradient changes with states that lie so many places from it, or more.

    Arguments:
        slope: The density's gradient.
        x: A path, ``(*batch, n)``.
        other: Another one, :func:`elsewhere`; some states far apart are moved to it.
        width: How many places.
    """
    n, here = x.shape[-1], slope(x)
    for _ in range(_DRAWS):
        gaps = torch.randint(2 * width, 4 * width + 1, (n,), device=x.device)
        moved = torch.zeros(n, dtype=torch.bool, device=x.device)
        places = gaps.cumsum(0) - int(torch.randint(2 * width + 1, (1,)))
        moved[places[places < n]] = True
        near = moved.clone()
        for k in range(1, width):
            near[k:] |= moved[:-k]
            near[:-k] |= moved[k:]
        change = (slope(torch.where(moved, other, x)) - here).abs()
        if bool((change > 1e-7 * here.abs().amax())[..., ~near].any()):
            return True
    return False
