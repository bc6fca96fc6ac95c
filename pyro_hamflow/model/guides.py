"""What is asked of a guide, whoever wrote it."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from pyro_hamflow.model.potential import Potential


class Guide(Protocol):
    """Draws all parameters on the real line, and says how likely each draw was.

    A guide may draw something more beside positions, such as momenta: with M the density of the
    pair and r any density of that something given the position, log M - log r stands for the log
    density of the position. A guide that draws nothing more has no r.
    """

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Sees the model's arguments before anything else is asked."""

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)`` and log M - log r of each, ``(num_samples,)``."""


class DensityGuide(Guide, Protocol):
    """A guide that also tells how likely given positions are."""

    def log_ratio(self, position: Tensor) -> Tensor:
        """Log M - log r, ``(positions,)``, at positions ``(positions, dimension)``.

        What the guide draws besides positions is here drawn from r.
        """


def draw_from(guide: Guide, potential: Potential, num_samples: int) -> tuple[Tensor, Tensor]:
    """What a guide draws, if these are draws of a model's parameters.

    Raises:
        ValueError: If they are of other shapes.
    """
    position, log_density = guide.draw(num_samples)
    expected = (num_samples, potential.dimension)
    if tuple(position.shape) != expected:
        raise ValueError(
            f"`guide` draws positions of shape {tuple(position.shape)}: expected {expected}, for "
            f"the sites {[site.name for site in potential.sites]}"
        )
    if tuple(log_density.shape) != (num_samples,):
        raise ValueError(
            f"`guide` draws log densities of shape {tuple(log_density.shape)}: expected "
            f"({num_samples},), one for each position"
        )
    return position, log_density


def log_ratio_at(guide: DensityGuide, position: Tensor) -> Tensor:
    """What a guide says of positions ``(positions, dimension)``, if it is one number for each.

    Raises:
        ValueError: If it is not.
    """
    value = guide.log_ratio(position)
    if tuple(value.shape) != (len(position),):
        raise ValueError(
            f"`guide` tells log densities of shape {tuple(value.shape)}: expected "
            f"({len(position)},), one for each position"
        )
    return value
