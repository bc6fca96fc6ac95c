"""Where the particles of a likelihood estimate come from.

A proposal turns noise into values of a model's local sites and says by how much each value is
over-represented: the log ratio of its prior density to the density it was drawn from. Mixtures are
never sampled: every component gets particles of its own (a *stratum*), and the sum over components
is exact.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.distributions as torch_dist
from torch import Tensor


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


class Proposal(Protocol):
    """How particles of local sites are drawn; see :class:`PriorProposal` for the plainest.

    Attributes:
        stratified: Whether each component of a mixture prior gets particles of its own.
        enough_particles: How many particles mostly serve well.
        is_defended: Whether some particles come from the prior, lest it misses something.
    """

    stratified: bool
    is_defended: bool
    enough_particles: int

    def noise_shape(self, name: str, fn: Any, components: int | None) -> torch.Size:
        """The shape of the noise of one element of a site.

        Arguments:
            name: The site.
            fn: Its prior.
            components: How many components of a mixture prior get particles of their own.
        """

    def draw(self, name: str, fn: Any, noise: Tensor, component: int | None) -> Draw:
        """Draws the value of a site.

        Arguments:
            name: The site.
            fn: Its prior distribution, given all that comes before it.
            noise: Standard normal noise, of shape ``batch_shape + noise_shape``.
            component: Which component of a mixture prior to draw from; ``None`` for others.
        """


def component_count(fn: Any) -> int | None:
    """The number of components of a mixture; ``None`` for every other distribution."""
    if isinstance(fn, torch_dist.MixtureSameFamily):
        return int(fn.mixture_distribution.logits.shape[-1])
    return None


def component_log_weight(fn: torch_dist.MixtureSameFamily, component: int) -> Tensor:
    """The log weight of one component of a mixture, of the mixture's batch shape."""
    logits = fn.mixture_distribution.logits
    return torch.log_softmax(logits, -1)[..., component]
