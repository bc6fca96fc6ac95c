"""The modes of a path's posterior: its log joint density to second order, and Newton's method."""

from __future__ import annotations

import math
from functools import partial

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
from pyro_hamflow.marginal.path_looks import Look, LookAt, LookFrom, added
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import Program, capture

_STEPS = 100  # of Newton at most
_DAMPED = 1e-2  # of the precision's diagonal, that is added after a step that has failed
_ASIDE = 0.1  # of the way from the prior's centre to a draw
_REST = 1e-9  # of the Newton decrement, squared standard deviations for each coordinate
_LIGHTEST = 3.0  # by how much the log mass of another mode may be lower that is told of
_AT_ONCE = 2**22  # numbers of paths whose gradients are taken
_LEAST = 1e-2  # of the precision of where gradients are taken: it has to be positive
_SPREAD = math.sqrt(3.0)  # of the points of Gauss and Hermite, in standard deviations
_CENTRE, _SIDE = 2.0 / 3.0, 1.0 / 6.0  # their weights


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
        if 1 < width == x.shape[-1]:  # as many gradients would be needed
            return False
        exact = expand(density, x, width).bands
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

    program = captured_or_not(run, x, *parameters.values())

    def look_at(parameters: dict[str, Tensor]) -> LookFrom:
        values = [parameters[name] for name in names]
        return lambda x: Look(*(part.detach() for part in program(x, *values)))

    return look_at


def captured_or_not(run: Program, *examples: Tensor) -> Program:
    """A function of tensors as a program, or as it is where it cannot be one."""
    try:
        return capture(run, *examples)
    except Exception:  # whatever the model's own code may raise
        return run


def higher_start(parts: Parts, x: Tensor, centre: Tensor) -> Tensor:
    """Where to begin a climb: at a draw of the prior, or beside the prior's centre, if higher.

    Draws of a wide prior may lie where the likelihood is far from anything that Newton's method
    knows. The centre itself may be a saddle.

    Arguments:
        parts: The log densities.
        x: The draw, of shape ``(*group.shape, n)``.
        centre: The prior's, of the same shape.
    """
    inner = x + (1.0 - _ASIDE) * (centre - x)
    heights = [(parts.prior(at) + parts.likelihood(at)).nan_to_num(-math.inf) for at in (inner, x)]
    return torch.where((heights[0] > heights[1])[..., None], inner, x)


def centre_of(prior: Density, x: Tensor, width: int) -> Tensor:
    """The centre of a prior as a path tells it.

    Arguments:
        prior: Its log density.
        x: The path, of shape ``(*group.shape, n)``.
        width: How many bands the prior has.
    """
    found = expand(prior, x, width)
    return x + banded.solve_both(banded.nearest_root(found.bands), found.gradient)


def climb(look: LookFrom, x: Tensor) -> Tensor:
    """Finds the mode of each element's joint density by damped Newton steps.

    Arguments:
        look: The joint log density to second order.
        x: Where to begin, of shape ``(*group.shape, n)``.
    """
    damping = torch.full_like(x[..., 0], 1e-6)
    here = look(x)
    for _ in range(_STEPS):
        step = here.step(damping)
        decrement = (here.slope * step).sum(-1)
        new = x + step
        there = look(new)
        better = (there.value >= here.value - 1e-12 * here.value.abs()) & there.is_finite()
        rests = (decrement <= _REST * x.shape[-1]) & (damping <= _DAMPED)
        damping = torch.where(better, damping * 0.1, (damping * 10).clamp(min=_DAMPED))
        x = torch.where(better[..., None], new, x).detach()
        here = here.chosen(there, better)
        if bool((rests | (damping > 1e8)).all()):
            break
    return x


def other_modes(look: LookFrom, mode: Tensor, starts: list[Tensor]) -> Tensor:
    """Whether paths of other modes weigh about as much as those that were fitted.

    Arguments:
        look: The joint log density to second order at the pilot.
        mode: The one that was fitted.
        starts: Where to begin searches for other modes.

    Returns:
        For each element, ``(*group.shape)``.
    """
    fitted = look(mode)
    deviations, least = fitted.deviations(), fitted.mass() - _LIGHTEST
    found = torch.zeros_like(least, dtype=torch.bool)
    for start in starts:
        x = climb(look, start)
        is_other = ((x - mode).abs() > deviations).any(-1)
        found |= is_other & (look(x).mass() > least)
    return found
