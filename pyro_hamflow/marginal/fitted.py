"""Sites of a likelihood as they were fitted, and where."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.marginal.likelihood_site import LikelihoodSite, Sites, Spread
from pyro_hamflow.marginal.noise_layout import Components

_NOTHING = 1e-5  # relative to the largest slope, what differences may leave of none


class Fitted(NamedTuple):
    """The sites of one group, and where they were fitted.

    Attributes:
        sites: For each mode and local site a site under its prior, and one under a wider prior.
        mode: The coordinates where the joint density is highest, ``(*group.shape, dimension)``.
        spread: How several modes share out each element, and their tails; none if one was sought.
    """

    sites: tuple[Sites, ...]
    mode: Tensor
    spread: Spread | None = None


@dataclass(frozen=True)
class Anchor:
    """Where sites were fitted, so that they can tell how far parameters have moved since.

    Attributes:
        values: Constrained values of all parameters.
        followed: The names of those that are followed.
    """

    values: dict[str, Tensor]
    followed: tuple[str, ...]

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has that is followed."""
        return [self.values[name].numel() for name in self.followed]

    def shift(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """By how much parameters differ from here, a vector.

        In their supports, for there cut points and gaps between them are parts of linear
        predictors, with which the modes move in proportion.
        """
        parts = [(parameters[name] - self.values[name]).reshape(-1) for name in self.followed]
        return torch.cat(parts) if parts else None

    def at(self, shift: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`shift`."""
        parts = dict(zip(self.followed, shift.split(self.sizes), strict=True))
        return self.values | {
            name: self.values[name] + part.reshape(self.values[name].shape)
            for name, part in parts.items()
        }


@dataclass(frozen=True)
class Fit:
    """The sites of all groups.

    Attributes:
        anchor: The parameter values that they were fitted at.
        sites: Those of each group and choice of components of mixture priors.
    """

    anchor: Anchor
    sites: dict[tuple[str, Components], Fitted]


def keep_what_moves(anchor: Anchor, fits: dict[Any, Fitted]) -> tuple[Anchor, dict[Any, Fitted]]:
    """Leaves out parameters that no site follows: those of priors, mostly.

    Arguments:
        anchor: What the sites follow.
        fits: The sites.
    """
    modes = [sites for fit in fits.values() for sites in fit.sites]
    sites = [site for mode in modes for pair in mode.values() for site in pair]
    slopes = [site.slopes for site in sites if site.slopes is not None]
    if not slopes:
        return anchor, fits
    largest = torch.stack([part.abs().flatten(0, -2).amax(0) for part in slopes]).amax(0)
    moves = (largest > _NOTHING * largest.max()).split(anchor.sizes)
    follows = [bool(part.any()) for part in moves]
    kept = torch.cat([part | part.any() for part in moves])

    def shorten(site: LikelihoodSite) -> LikelihoodSite:
        slopes = site.slopes if any(follows) else None
        return replace(site, slopes=None if slopes is None else slopes[..., kept])

    def shorten_all(fit: Fitted) -> Fitted:
        modes = ({n: (shorten(a), shorten(b)) for n, (a, b) in m.items()} for m in fit.sites)
        return fit._replace(sites=tuple(modes))

    shorter = {key: shorten_all(fit) for key, fit in fits.items()}
    followed = tuple(name for name, is_so in zip(anchor.followed, follows, strict=True) if is_so)
    return replace(anchor, followed=followed), shorter
