"""The modes of a path's posterior: its log joint density to second order, and Newton's method."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.path_bands import Bands
from pyro_hamflow.marginal.path_density import (
    Density,
    Expansion,
    Parts,
    PartsAt,
    expand,
    gradient,
)
from pyro_hamflow.marginal.path_kinks import Cells, Kinks, about, has_kinks, is_flat, is_steep
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import capture

_STEPS = 100  # of Newton at most
_DAMPED = 1e-2  # of the precision's diagonal, that is added after a step that has failed
_ASIDE = 0.1  # of the way from the prior's centre to a draw
_REST = 1e-9  # of the Newton decrement, squared standard deviations for each coordinate
_LIGHTEST = 3.0  # by how much the log mass of another mode may be lower that is told of
_AT_ONCE = 2**22  # numbers of paths whose gradients are taken
_LEAST = 1e-2  # of the precision of where gradients are taken: it has to be positive
_SPREAD = math.sqrt(3.0)  # of the points of Gauss and Hermite, in standard deviations
_CENTRE, _SIDE = 2.0 / 3.0, 1.0 / 6.0  # their weights


class Look(NamedTuple):
    """The joint log density of a path to second order about a place.

    Attributes:
        value: Of shape ``(*group.shape)``.
        slope: Its gradient, ``(*group.shape, n)``.
        precision: The lower bands of minus its Hessian, that of the likelihood clamped.
    """

    value: Tensor
    slope: Tensor
    precision: Tensor


LookAt = Callable[[dict[str, Tensor]], Callable[[Tensor], Look]]  # for values of the parameters


def site_at(parts: Parts, x: Tensor, width: int, deviations: Tensor | None) -> Expansion:
    """The expansion of the likelihood, clamped where it is not concave."""
    if width > 1 or deviations is None:
        found = expand(parts.likelihood, x, width)
        return found if width > 1 else found._replace(bands=found.bands.clamp(min=0.0))
    aside = _SPREAD * deviations
    places = torch.stack([x, x + aside, x - aside])
    at_places = torch.func.vmap(lambda place: tuple(expand(parts.likelihood, place, 1)))(places)
    slope, bands = (_CENTRE * at[0] + _SIDE * (at[1] + at[2]) for at in at_places)
    return Expansion(slope, bands.clamp(min=0.0))


def find_kinks(parts: Parts, cells: Cells, bands: Bands) -> Kinks:
    """Which log densities have kinks about a path, or a prior's heavy tails."""
    x, deviations = cells
    at_once = max(1, _AT_ONCE // x.numel())
    # States lie elsewhere beside their neighbours there: a Gaussian has the same curvature.
    aside = x + deviations * torch.arange(x.shape[-1]).to(x).square().sin()

    def found(density: Density, width: int, *, tails: bool) -> bool:
        exact = expand(density, x, width).bands
        if 1 < width == x.shape[-1]:  # as many gradients would be needed
            return False
        tails = tails and not torch.allclose(expand(density, aside, width).bands, exact)
        if not (tails or bool(is_flat(exact, deviations).any())):
            return False
        slopes = torch.func.vmap(partial(gradient, density), chunk_size=at_once)
        _, told = about(slopes, cells, *cells, width)
        is_misled = tails and is_steep(exact, told, deviations)
        return is_misled or has_kinks(exact, told, deviations)

    return Kinks(
        found(parts.prior, bands.prior, tails=True),
        found(parts.likelihood, bands.likelihood, tails=False),
    )


def expand_about(
    parts: Parts, x: Tensor, deviations: Tensor, bands: Bands, kinks: Kinks, cells: Cells
) -> tuple[Expansion, Expansion]:
    """Expansions of prior and likelihood, means of gradients where there are kinks."""

    def mean(density: Density, width: int) -> Expansion:
        return Expansion(
            *about(torch.func.vmap(partial(gradient, density)), cells, x, deviations, width)
        )

    if kinks.prior:
        slope, told = mean(parts.prior, bands.prior)
        least = _LEAST * cells.spread.square().reciprocal()
        prior = Expansion(slope, torch.cat([told[..., :1] + least[..., None], told[..., 1:]], -1))
    else:
        prior = expand(parts.prior, x, bands.prior)
    if not kinks.likelihood:
        return prior, site_at(parts, x, bands.likelihood, deviations)
    site = mean(parts.likelihood, bands.likelihood)
    return prior, site._replace(bands=site.bands.clamp(min=0.0)) if bands.likelihood == 1 else site


def added(first: Tensor, second: Tensor) -> Tensor:
    """The sum of two matrices that may differ in how many bands they have."""
    width = max(first.shape[-1], second.shape[-1])
    wide = [torch.nn.functional.pad(m, (0, width - m.shape[-1])) for m in (first, second)]
    return wide[0] + wide[1]


def deviations_of(precision: Tensor) -> Tensor:
    """The standard deviations that a precision says: the gradient of its log determinant."""
    with torch.enable_grad():
        precision = precision.detach().requires_grad_()
        total = banded.log_det(banded.nearest_root(precision)).sum()
        (slope,) = torch.autograd.grad(total, precision)
    return slope[..., 0].clamp(min=0.0).sqrt()


def captured_looks(
    parts_at: PartsAt, bands: Bands, x: Tensor, parameters: dict[str, Tensor]
) -> LookAt:
    """The joint log density to second order, captured where that is possible.

    Arguments:
        parts_at: The log densities, for given values of the parameters.
        bands: How many bands they have.
        x: A path to look from.
        parameters: Values of the parameters to look at.
    """
    names = list(parameters)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        parts = parts_at(dict(zip(names, values, strict=True)))
        prior = expand(parts.prior, x, bands.prior)
        site = site_at(parts, x, bands.likelihood, None)
        value = parts.prior(x) + parts.likelihood(x)
        return value, prior.gradient + site.gradient, added(prior.bands, site.bands)

    program: Callable[..., tuple[Tensor, ...]] = run
    try:
        program = capture(run, x, *parameters.values())
    except Exception:  # whatever the model's own code may raise
        pass

    def look_at(parameters: dict[str, Tensor]) -> Callable[[Tensor], Look]:
        values = [parameters[name] for name in names]
        return lambda x: Look(*(part.detach() for part in program(x, *values)))

    return look_at


def higher_start(parts: Parts, x: Tensor, width: int) -> Tensor:
    """Where to begin a climb: at a draw of the prior, or beside the prior's centre, if higher.

    Draws of a wide prior may lie where the likelihood is far from anything that Newton's method
    knows. The centre itself may be a saddle.

    Arguments:
        parts: The log densities.
        x: The draw, of shape ``(*group.shape, n)``.
        width: How many bands the prior has.
    """
    prior = expand(parts.prior, x, width)
    way = banded.solve_both(banded.nearest_root(prior.bands), prior.gradient)
    inner = x + (1.0 - _ASIDE) * way
    heights = [(parts.prior(at) + parts.likelihood(at)).nan_to_num(-math.inf) for at in (inner, x)]
    return torch.where((heights[0] > heights[1])[..., None], inner, x)


def climb(look: Callable[[Tensor], Look], x: Tensor) -> Tensor:
    """Finds the mode of each element's joint density by damped Newton steps.

    Arguments:
        look: The joint log density to second order.
        x: Where to begin, of shape ``(*group.shape, n)``.
    """
    damping = torch.full_like(x[..., :1], 1e-6)
    here = look(x)
    for _ in range(_STEPS):
        diagonal = here.precision[..., :1]
        size = diagonal.abs().clamp(min=torch.finfo(x.dtype).tiny)
        damped = torch.cat([diagonal + damping[..., None] * size, here.precision[..., 1:]], -1)
        step = banded.solve_both(banded.nearest_root(damped), here.slope)
        decrement = (here.slope * step).sum(-1)
        new = x + step
        there = look(new)
        better = (there.value >= here.value - 1e-12 * here.value.abs()) & _is_finite(there)
        rests = (decrement <= _REST * x.shape[-1]) & (damping[..., 0] <= _DAMPED)
        damping = torch.where(better[..., None], damping * 0.1, (damping * 10).clamp(min=_DAMPED))
        x = torch.where(better[..., None], new, x).detach()
        here = Look(
            torch.where(better, there.value, here.value),
            torch.where(better[..., None], there.slope, here.slope),
            torch.where(better[..., None, None], there.precision, here.precision),
        )
        if bool((rests | (damping[..., 0] > 1e8)).all()):
            break
    return x


def _is_finite(look: Look) -> Tensor:
    """Where something is known to second order, ``(*group.shape)``."""
    return look.slope.isfinite().all(-1) & look.precision.isfinite().all(-1).all(-1)


def other_modes(look: Callable[[Tensor], Look], mode: Tensor, starts: list[Tensor]) -> Tensor:
    """Whether paths of other modes weigh about as much as those that were fitted.

    Arguments:
        look: The joint log density to second order at the pilot.
        mode: The one that was fitted.
        starts: Where to begin searches for other modes.

    Returns:
        For each element, ``(*group.shape)``.
    """

    def mass(here: Look) -> Tensor:
        return here.value - 0.5 * banded.log_det(banded.nearest_root(here.precision))

    fitted = look(mode)
    deviations, least = deviations_of(fitted.precision), mass(fitted) - _LIGHTEST
    found = torch.zeros_like(least, dtype=torch.bool)
    for start in starts:
        x = climb(look, start)
        is_other = ((x - mode).abs() > deviations).any(-1)
        found |= is_other & (mass(look(x)) > least)
    return found
