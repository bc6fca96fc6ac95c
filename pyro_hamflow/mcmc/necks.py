"""Where trajectories diverge: at which end of which parameter, and what is narrow there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_hamflow.mcmc.diagnosis import worst
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.model.sites import Site

_TOGETHER = 3.5  # standard errors of the mean rank of draws that diverged, beyond which it is told
_AS_WELL = 0.7  # of the most of these, with which a parameter of a smaller site is named instead
_OUTER = 10  # one of so many draws is at an end
_NARROW = 0.7  # of the usual spread
_ERRORS = 7.0  # over the root of the number of draws at an end: four errors of a spread
_EACH = 10  # draws at an end for each coordinate, beyond which spreads are those given all others
_FAR = 5.0  # medians, beyond which differences count as these
_RIDGE = 1e-9  # of their covariance, as some may be functions of others


class Neck(NamedTuple):
    """The end of a parameter at which trajectories diverge.

    Attributes:
        column: The coordinate.
        is_low: Whether they do where it is small, or large.
        narrow: Another coordinate that is narrow there, if one is.
        share: Of its usual spread given others, that it has there.
    """

    column: int
    is_low: bool
    narrow: int | None
    share: float


def find_neck(draws: Draws, sites: Sequence[Site]) -> Neck | None:
    """Where draws lie that diverged, if they lie at one end, and what is narrow there.

    By the mean rank of those draws. Where several parameters tell as much, that of the site with
    the fewest elements is named: scales are few, and tell more than the effects that they govern.
    """
    chains, length, dimension = draws.extent
    diverging = draws.stats["diverging"].flatten().cpu()
    number = int(diverging.sum())
    if not (dimension and 0 < number < chains * length):
        return None
    columns = worst(draws)
    rows = draws.columns(columns).reshape(-1, len(columns)).double().cpu()
    ranks = rows.argsort(0).argsort(0)[diverging].double() + 0.5
    away = (ranks.mean(0) / len(rows) - 0.5) * (12.0 * number) ** 0.5
    least = max(_TOGETHER, _AS_WELL * float(away.abs().max()))
    found = (away.abs() > least).nonzero()[:, 0].tolist()
    if not found:
        return None
    sites_of = [site_of(sites, column) for column in columns]
    sizes = [site.stop - site.start for site in sites_of]
    place = min(found, key=lambda i: (sizes[i], -float(away[i].abs())))
    is_low = float(away[place]) < 0.0
    share = _shares(place, rows, is_low=is_low)
    at_end = len(rows) / _OUTER
    limit = min(_NARROW, math.exp(-_ERRORS / at_end**0.5))
    narrow = (share < limit).nonzero()[:, 0].tolist()
    if not narrow:
        return Neck(columns[place], is_low, None, 1.0)
    other = min(narrow, key=lambda i: (-sizes[i], float(share[i])))  # of effects, not their mean
    return Neck(columns[place], is_low, columns[other], float(share[other]))


def _shares(place: int, rows: Tensor, *, is_low: bool) -> Tensor:
    """The spread of coordinates at an end of one, in shares of that in the middle, ``(columns,)``.

    By differences of draws that lie next to each other in its order: what changes of others' centre
    along it does not count. That of each is given all others, where draws are enough: effects that
    are narrow about their mean are as wide as this is.
    """
    order = rows[:, place].argsort()
    kept = torch.cat([torch.ones(1, dtype=torch.bool), rows[order, place].diff() > 0.0])
    apart = rows[order[kept]].diff(dim=0)
    end, share = len(apart) // _OUTER, torch.ones_like(rows[0])
    if end:
        others = torch.arange(rows.shape[1]) != place
        apart = apart[:, others]
        outer = apart[:end] if is_low else apart[-end:]
        usual = apart[3 * end : -3 * end]
        given = end > _EACH * apart.shape[1]
        share[others] = (_spread(outer, given=given) / _spread(usual, given=given)).nan_to_num(1.0)
    return share


def _spread(apart: Tensor, *, given: bool) -> Tensor:
    """The spread of each coordinate, by itself or given all others."""
    if not given:
        return apart.abs().median(0).values
    size = apart.abs().median(0).values.clamp(min=1e-300)
    scaled = (apart / size).clamp(-_FAR, _FAR)
    gram = scaled.mT @ scaled / (len(apart) - len(size)) + _RIDGE * torch.eye(len(size)).to(scaled)
    return size / torch.linalg.inv(gram).diagonal().sqrt()


def neck_message(neck: Neck, sites: Sequence[Site]) -> str:
    """One sentence, and a second with the remedy where it can be told."""
    name, end = name_of(sites, neck.column), "small" if neck.is_low else "large"
    if neck.narrow is None:
        return f"Divergences lie where '{name}' is {end}: too few draws may be there."
    other = name_of(sites, neck.narrow)
    in_units = "by `whiten` or Pyro's `LocScaleReparam`"
    if neck.is_low:
        remedy = f"If it is a scale of '{other}', sample that in its units, {in_units}."
    else:
        remedy = (
            f"If '{other}' is in units of '{name}', data tell it too well for that: sample the "
            f"effect itself. If '{name}' is a precision, sample '{other}' in units of its scale, "
            f"{in_units}."
        )
    return (
        f"Divergences lie where '{name}' is {end}, and '{other}' has {neck.share:.2g} of its usual "
        f"spread given the others: steps are too long there, and too few draws may be. {remedy}"
    )


def site_of(sites: Sequence[Site], column: int) -> Site:
    """The site that a coordinate belongs to."""
    return next(site for site in sites if site.start <= column < site.stop)


def name_of(sites: Sequence[Site], column: int) -> str:
    """The name of a coordinate, as ArviZ writes it: ``x[2, 0]``."""
    site = site_of(sites, column)
    if not site.shape:
        return site.name
    index = np.unravel_index(column - site.start, tuple(site.shape))
    return f"{site.name}[{', '.join(str(int(i)) for i in index)}]"
