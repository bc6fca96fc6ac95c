"""Sites of a likelihood as they were fitted, and where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_hamflow.marginal.likelihood_site import LikelihoodSite, Sites, Spread
from pyro_hamflow.marginal.noise_layout import Components
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.model.supports import support_of
from pyro_hamflow.process import random_state_kept

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
        ratios: Of these the positive ones that are followed by their logarithms.
    """

    values: dict[str, Tensor]
    followed: tuple[str, ...]
    ratios: frozenset[str] = frozenset()

    @property
    def sizes(self) -> list[int]:
        """How many numbers each parameter has that is followed."""
        return [self.values[name].numel() for name in self.followed]

    def shift(self, parameters: dict[str, Tensor]) -> Tensor | None:
        """By how much parameters differ from here, a vector.

        In their supports, for there cut points and gaps between them are parts of linear
        predictors, with which the modes move in proportion; or by the logarithms of their ratios.
        """
        parts = []
        for name in self.followed:
            new, old = parameters[name], self.values[name]
            parts.append((new / old).log() if name in self.ratios else new - old)
        return torch.cat([part.reshape(-1) for part in parts]) if parts else None

    def at(self, shift: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`shift`."""
        parts = dict(zip(self.followed, shift.split(self.sizes), strict=True))
        moved = {}
        for name, part in parts.items():
            old = self.values[name]
            step = part.reshape(old.shape)
            moved[name] = old * step.exp() if name in self.ratios else old + step
        return self.values | moved

    def by_ratios(self, slopes: Tensor) -> Tensor:
        """From slopes in parameters, their last dimension, to those in shifts from here."""
        factors = []
        for name in self.followed:
            value = self.values[name].reshape(-1)
            factors.append(value if name in self.ratios else torch.ones_like(value))
        return slopes * torch.cat(factors).to(slopes)


def is_positive(name: str, fn: TorchDistribution) -> bool:
    """Whether a site's support is that of positive numbers, as a scale's is."""
    support = support_of(name, fn)
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    bounded_below = isinstance(support, constraints.greater_than | constraints.greater_than_eq)
    return bounded_below and bool((torch.as_tensor(support.lower_bound) == 0.0).all())


def positive_of(plan: Plan, values: dict[str, Tensor], names: Sequence[str]) -> list[str]:
    """Which of some parameters are positive, so that their logarithms may be followed."""
    if not names:
        return []
    with random_state_kept():
        nodes = plan.trace(values).nodes
    positive = (name for name in names if is_positive(name, nodes[name]["fn"]))
    return [name for name in positive if bool((values[name] > 0.0).all())]


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
