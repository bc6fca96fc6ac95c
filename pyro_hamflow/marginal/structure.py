"""What is found out about a model before its local sites are integrated out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_hamflow.model.trace import Frames


@dataclass(frozen=True)
class Group:
    """Local sites that are integrated out together, one estimate per element of their plates.

    Attributes:
        sites: The local sites, in the model's order.
        terms: Observed sites whose log densities enter the estimate.
        frames: The plates around the group, leftmost first.
        event_dims: The number of event dimensions of each site.
        rows: For each term outside these plates, to which element each entry of its log density
            belongs: an integer tensor of its shape, counted from zero; -1 where to none.
    """

    sites: tuple[str, ...]
    terms: tuple[str, ...]
    frames: Frames
    event_dims: tuple[int, ...]
    rows: Mapping[str, Tensor] = field(default_factory=dict, compare=False)

    @property
    def name(self) -> str:
        return "_".join(self.sites)

    @property
    def shape(self) -> torch.Size:
        """The shape of the group's independent elements."""
        return torch.Size(frame.size for frame in self.frames)


@dataclass(frozen=True)
class Structure:
    """What :func:`~pyro_hamflow.marginal.dependence.analyse` finds out about a model.

    Attributes:
        key: What the model did when it was looked at: it holds for runs that do the same.
        values: The latent sites' values then.
        groups: The groups of local sites.
        parameters: The latent sites that stay, discrete ones included.
        hidden: Sites that take part in an estimate, or follow from local values.
        placeholders: A value for each local and each discrete site, to run the rest with.
        nesting: How many dimensions, counted from the right, are plates.
    """

    key: str
    values: dict[str, Tensor]
    groups: tuple[Group, ...]
    parameters: tuple[str, ...]
    hidden: frozenset[str]
    placeholders: dict[str, Tensor]
    nesting: int

    @property
    def rest(self) -> dict[str, Tensor]:
        """Of terms outside the plates of their group, the entries that no local site enters."""
        rows = {term: rows for group in self.groups for term, rows in group.rows.items()}
        return {term: of < 0 for term, of in rows.items() if bool((of < 0).any())}
