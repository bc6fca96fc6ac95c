"""How the noise of one estimate is shared out among its sites and particles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_hamflow.marginal.points import noise_count
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.trace import (
    Frames,
    depth_of,
    plate_shape,
)

Components = tuple[tuple[str, int], ...]  # that of each site with a mixture prior

PRIOR_SHARE = 0.01  # of the prior in the mixture that all particles are weighed by


@dataclass(frozen=True)
class Block:
    """One site's share of an element's coordinates: ``start`` to ``stop``.

    Attributes:
        start: Its first coordinate.
        stop: One past its last.
        frames: The plates around the site.
        event: The shape of the coordinates of one element of the site's batch.
    """

    start: int
    stop: int
    frames: Frames
    event: torch.Size

    def spread(self, coordinates: Tensor, group: Group) -> Tensor:
        """Brings an element's coordinates into the shape of the site.

        Arguments:
            coordinates: Of shape ``(*group.shape, dimension)``.
            group: The group that the site belongs to.

        Returns:
            Of shape ``(*batch, *event)``, plates at their own dimensions.
        """
        order = group.frames + self._inner(group)
        part = coordinates[..., self.start : self.stop]
        part = part.reshape([frame.size for frame in order] + list(self.event))
        ranks = sorted(range(len(order)), key=lambda i: order[i].dim)
        part = part.permute([*ranks, *range(len(order), part.dim())])
        return part.reshape(self._batch_shape() + list(self.event))

    def collect(self, values: Tensor, group: Group) -> Tensor:
        """The inverse of :meth:`spread`, for values of shape ``(*batch, *event)``."""
        order = group.frames + self._inner(group)
        values = values.expand(self._batch_shape() + list(self.event))
        by_dim = sorted(order, key=lambda frame: frame.dim)
        values = values.reshape([frame.size for frame in by_dim] + list(self.event))
        ranks = [by_dim.index(frame) for frame in order]
        values = values.permute([*ranks, *range(len(order), values.dim())])
        return values.reshape(list(group.shape) + [self.stop - self.start])

    def gather(self, values: Tensor, group: Group) -> Tensor:
        """What :meth:`collect` does, with the plates left where they are.

        Arguments:
            values: Of shape ``(*enumerated, *batch, *event)``.
            group: The group that the site belongs to.

        Returns:
            Of shape ``(*enumerated, *batch, stop - start)``, plates inside the group's of size one.
        """
        inner, rank = self._inner(group), len(self.event)
        full = torch.Size(self._batch_shape()) + self.event
        values = values.expand(torch.broadcast_shapes(values.shape, full))
        last = range(-rank - len(inner), -rank)
        values = values.movedim([frame.dim - rank for frame in inner], list(last))
        values = values.flatten(-rank - len(inner))
        for frame in reversed(inner):
            values = values.unsqueeze(frame.dim - 1)
        return values

    def _inner(self, group: Group) -> Frames:
        return tuple(frame for frame in self.frames if frame not in group.frames)

    def _batch_shape(self) -> list[int]:
        return plate_shape(self.frames, depth_of(self.frames))


@dataclass(frozen=True)
class Stratum:
    """Particles that share the components of their mixture priors, and where they come from.

    Attributes:
        components: The component of each site with a mixture prior.
        count: How many particles.
        share: How much they count beside those of the same components from elsewhere.
        from_prior: Whether they come from the prior, to defend another proposal.
        mode: Otherwise, about which of an element's modes they lie.
    """

    components: Components
    count: int
    share: float = 1.0
    from_prior: bool = False
    mode: int = 0

    @property
    def is_shared(self) -> bool:
        """Whether other particles of the same components come from elsewhere."""
        return self.share < 1.0


@dataclass(frozen=True)
class Layout:
    """The noise of one group: which coordinates serve which site, and which particles.

    Attributes:
        blocks: The share of each site.
        dimension: How many coordinates an element has.
        strata: The particles; those of the same components follow one another.
        points: ``"iid"``, ``"antithetic"`` or ``"rqmc"``.
        example: A tensor of the noise's type and device: the type that all latent sites have, and
            the densities of the group's own, by promotion.
    """

    blocks: dict[str, Block]
    dimension: int
    strata: tuple[Stratum, ...]
    points: str
    example: Tensor

    @property
    def num_particles(self) -> int:
        """How many particles each element has."""
        return sum(stratum.count for stratum in self.strata)

    @cached_property
    def log_factors(self) -> Tensor:
        """By what the weight of each particle enters the sum over all, ``(particles,)``."""
        factors = [math.log(s.share / s.count) for s in self.strata for _ in range(s.count)]
        return torch.tensor(factors).to(self.example)

    @cached_property
    def from_prior(self) -> Tensor:
        """Whether each particle comes from the prior to defend another proposal."""
        flags = [s.from_prior for s in self.strata for _ in range(s.count)]
        return torch.tensor(flags, device=self.example.device)

    @cached_property
    def choices(self) -> tuple[Components, ...]:
        """The choices of components of the mixture priors."""
        return tuple(dict.fromkeys(stratum.components for stratum in self.strata))

    def each(self, numbers: list[int] | list[bool]) -> Tensor:
        """A number for each stratum, as a tensor."""
        return torch.tensor(numbers, device=self.example.device)

    def noise_shape(self, group: Group) -> torch.Size:
        vectors = sum(noise_count(self.points, stratum.count) for stratum in self.strata)
        return torch.Size([vectors, *group.shape, self.dimension])

    def split(self, noise: Tensor) -> list[Tensor]:
        """The noise of each stratum."""
        return list(noise.split([noise_count(self.points, s.count) for s in self.strata]))
