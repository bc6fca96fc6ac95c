"""Where the particles of a likelihood estimate come from.

A proposal turns noise into values of a model's local sites and says by how much each value is
over-represented: the log ratio of its prior density to the density it was drawn from. Mixtures are
never sampled: every component gets particles of its own (a *stratum*), and the sum over components
is exact.

A :class:`Proposal` is what a marginal model has. It is a value: fitting one gives another. What it
makes for each run of the model, and for each particle there, is a :class:`Particle`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import pyro.poutine as poutine
import torch
import torch.distributions as torch_dist
from pyro.distributions import TorchDistribution
from torch import Tensor

from pyro_hamflow.marginal.gaussian_form import Component, pick
from pyro_hamflow.marginal.noise_layout import Components, Stratum
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.structure import Group

_STRETCH = 1e-4  # of the fifth power: moves noise of 3 by .02, of 6 by .8


class Draw(NamedTuple):
    """Particles of one site.

    Attributes:
        value: The site's value.
        log_ratios: Log prior minus log proposal density, per element of the site's batch, for each
            density of a mixture; none where the particles come from the prior itself.
        origin: The noise from which the prior itself would have made the value; ``None`` where that
            is not known, or is the noise that was given.
    """

    value: Tensor
    log_ratios: tuple[Tensor, ...]
    origin: Tensor | None = None


class Particle(Protocol):
    """What draws one particle of every element of a group, one local site after the other."""

    def draw(
        self, name: str, fn: TorchDistribution, noise: Tensor, component: Component | None
    ) -> Draw:
        """Draws the value of a site.

        Arguments:
            name: The site.
            fn: Its prior distribution, given all that comes before it.
            noise: Standard normal noise, of shape ``batch_shape + noise_shape``.
            component: Which component of a mixture prior to draw from; ``None`` for others. A
                tensor where the proposal joins components.
        """

    def mix(self, log_ratios: list[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The log ratio of the prior's density to that of all particles alike.

        Arguments:
            log_ratios: The log ratios that the sites' draws gave, summed to elements.

        Returns:
            The log ratio, and the logarithm of the particle's share in that density; none where all
            come from the same.
        """


class Proposal(ABC):
    """Where particles come from.

    A new one is a class in a file of its own, and :func:`~pyro_hamflow.marginalize` takes what it
    makes. Two methods are enough, as in :mod:`~pyro_hamflow.marginal.proposals.prior`; the others
    are for proposals that are fitted to the data, or that have choices.

    Attributes:
        name: What it is called where settings are printed.
        stratified: Whether each component of a mixture prior gets particles of its own.
        joins_components: Whether particles of different components are made by one run of the
            model, which takes less time.
        enough_particles: How many particles mostly serve well.
        is_defended: Whether some particles come from the prior, lest it misses something.
        needs_fit: Whether it has to be fitted to the data, at a pilot value of the parameters.
        is_comparable: Whether particles from the prior can tell what it misses, as they can where
            elements have few coordinates.
        remark: What it was found to miss where it was fitted, in a sentence.
        misses_modes: Whether these were modes.
        is_final: Whether nothing takes its place in the search for a pilot, and warm-up leaves it
            as it is: the user wrote it for this model.
        tails: Factors by which its noise may be stretched, to be tried where it is fitted.
        fades: Whether estimates may vary far more away from where it was fitted, within reach of
            the posterior, so that warm-up looks there, too.
    """

    name: str
    stratified: bool = True
    joins_components: bool = False
    enough_particles: int = 32
    is_defended: bool = False
    needs_fit: bool = False
    is_comparable: bool = True
    remark: str | None = None
    misses_modes: bool = False
    is_final: bool = True
    tails: tuple[float, ...] = ()
    fades: bool = False

    @abstractmethod
    def noise_shapes(
        self, plan: Plan, group: Group, trace: poutine.Trace, splits: Mapping[str, int | None]
    ) -> dict[str, torch.Size]:
        """The shape of the noise of one element of each local site of a group.

        Arguments:
            plan: The model.
            group: The group.
            trace: A run of the model.
            splits: For each site, how many components of a mixture prior get particles of their
                own.

        Raises:
            ValueError: If the proposal does not suit a site.
        """

    @abstractmethod
    def particle(
        self,
        plan: Plan,
        group: Group,
        stratum: Stratum,
        coordinates: Tensor,
        parameters: dict[str, Tensor],
        source: Tensor | None,
    ) -> Particle:
        """What draws one particle of every element.

        Arguments:
            plan: The model.
            group: The group.
            stratum: The particle's, or the first of those that are run together.
            coordinates: Its noise, of shape ``(*group.shape, dimension)``.
            parameters: The values of all sites that are not integrated out.
            source: The number of the particle's stratum; none where a single one is run.
        """

    def modes(self, group: Group) -> dict[Components, int]:
        """How many modes have particles of their own, by components; one where not given."""
        return {}

    def fit(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        """The proposal fitted to the data, at constrained values of the parameters."""
        return self

    def follow(self, plan: Plan, pilot: Mapping[str, Tensor]) -> Self:
        """The same for values close to those of the last fit, and for these alone."""
        return self.fit(plan, pilot)

    def stretched(self, tails: Mapping[str, Tensor]) -> Self:
        """The proposal with other tails.

        Arguments:
            tails: For each group, by how much the noise is stretched, of shape ``(*group.shape)``.
        """
        return self

    def closer(self) -> Self | None:
        """A proposal that follows the parameters more closely, at more cost; none if there is none.

        It is fitted to nothing.
        """
        return None

    def tail(self, plan: Plan, parameters: dict[str, Tensor]) -> float:
        """How far weights reach beyond what estimates show, as a variance of their logarithm.

        Arguments:
            plan: The model.
            parameters: The values of all sites that are not integrated out.
        """
        return 0.0

    def alternative(self, sites: Sequence[str], variance: float) -> str | None:
        """What may serve better, in a sentence; none if that is not known.

        Arguments:
            sites: The local sites, as the user named them.
            variance: That of the log estimate.
        """
        return None

    def undefended(self) -> Self:
        """The proposal without particles of the prior."""
        return self

    def telling_origins(self) -> Self | None:
        """The proposal with draws that tell their origins; none if it cannot."""
        return None


def component_count(fn: TorchDistribution) -> int | None:
    """The number of components of a mixture; ``None`` for every other distribution."""
    if isinstance(fn, torch_dist.MixtureSameFamily):
        return int(fn.mixture_distribution.logits.shape[-1])
    return None


def component_log_weight(fn: torch_dist.MixtureSameFamily, component: Component) -> Tensor:
    """The log weight of one component of a mixture, of the mixture's batch shape."""
    return pick(fn.mixture_distribution.logits, -1, component)  # whose exponentials sum to one


def stretched(z: Tensor) -> tuple[Tensor, Tensor]:
    """Standard normal noise ``(*, n)`` moved outwards, and the log growth of volume, ``(*)``."""
    fourth = z.square().square()  # a general power takes ten times as long
    return z + _STRETCH * fourth * z, torch.log1p(5.0 * _STRETCH * fourth).sum(-1)
