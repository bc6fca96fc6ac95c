"""What the training of a guide may minimise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from pyro_hamflow.checks import between
from pyro_hamflow.flows.energy import energy
from pyro_hamflow.model.guides import DensityGuide, draw_from, log_ratio_at
from pyro_hamflow.model.potential import Potential


class Objective:
    """What a guide's losses are made of: the bound, and the density of given draws.

    Arguments:
        guide: The guide.
        potential: The model.
        num_particles: From how many draws each loss is estimated.
    """

    def __init__(self, guide: DensityGuide, potential: Potential, num_particles: int) -> None:
        self.guide, self.potential, self.num_particles = guide, potential, num_particles
        self._flat: list[tuple[Mapping[str, Tensor], Tensor]] = []

    def reverse(self, inverse_temperature: float = 1.0) -> Tensor:
        """Minus the evidence bound, of the posterior to the power of an inverse temperature."""
        position, log_density = draw_from(self.guide, self.potential, self.num_particles)
        noise = self.potential.draw_noise(self.num_particles)
        return (log_density + inverse_temperature * energy(self.potential, position, noise)).mean()

    def forward(self, draws: Mapping[str, Tensor]) -> Tensor:
        """Minus a bound of the guide's log density, at some of the draws, picked at random."""
        known = [flat for given, flat in self._flat if given is draws]
        if not known:
            known.append(_flatten(draws, self.potential))
            self._flat.append((draws, known[0]))
        positions = known[0]
        picked = torch.randint(len(positions), (self.num_particles,), device=positions.device)
        return -log_ratio_at(self.guide, positions[picked]).mean()


class GuideLoss(Protocol):
    """What the training of a guide minimises."""

    def __call__(self, objective: Objective, progress: float) -> Tensor:
        """The loss.

        Arguments:
            objective: What it is made of.
            progress: The share of the steps that are done.
        """

    def settled(self, progress: float) -> bool:
        """Whether losses from now on can be compared with each other."""


@dataclass(frozen=True)
class ReverseKL:
    """Kullback-Leibler divergence of the guide from the posterior: minus the evidence bound.

    It needs no draws, and tends to miss modes that the guide has not found.

    Arguments:
        hottest: The temperature to begin with: the posterior to the power of its inverse, flatter
            than itself, is what the guide follows first; it cools to one geometrically.
        annealed: The share of the steps that cooling takes.

    Raises:
        ValueError: If the temperature is below one, or the share not between 0 and 1.
    """

    hottest: float = 1.0
    annealed: float = 0.5

    def __post_init__(self) -> None:
        between("hottest", self.hottest, 1.0, math.inf, ends="low")
        between("annealed", self.annealed, 0.0, 1.0, ends="none")

    def __call__(self, objective: Objective, progress: float) -> Tensor:
        left = max(0.0, 1.0 - progress / self.annealed)
        return objective.reverse(self.hottest**-left)

    def settled(self, progress: float) -> bool:
        return self.hottest == 1.0 or progress >= self.annealed


@dataclass(frozen=True)
class ForwardKL:
    """Kullback-Leibler divergence of the posterior from the guide, but for a constant, on draws.

    It covers every mode that the draws have.

    Arguments:
        draws: Draws of the posterior: a dictionary of the sites' values in their supports, draws
            first, as ``get_samples`` of an MCMC gives them.
        reverse: How much of :class:`ReverseKL` is added. With 1 it is the loss of Boltzmann
            generators, and few or biased draws do less harm.

    References:
        | Boltzmann generators (Noé et al., 2019)
        | https://arxiv.org/abs/1812.01729
    """

    draws: Mapping[str, Tensor] = field(repr=False)
    reverse: float = 0.0

    def __call__(self, objective: Objective, progress: float) -> Tensor:
        loss = objective.forward(self.draws)
        return loss + self.reverse * objective.reverse() if self.reverse else loss

    def settled(self, progress: float) -> bool:
        return True


def _flatten(draws: Mapping[str, Tensor], potential: Potential) -> Tensor:
    """Draws of the sites in their supports as positions, ``(draws, dimension)``."""
    parts = []
    for site in potential.sites:
        if site.name not in draws:
            raise ValueError(f"`draws` lacks values of site '{site.name}'")
        free = site.transform.inv(draws[site.name])
        if tuple(free.shape[1:]) != tuple(site.shape):
            raise ValueError(
                f"`draws` of site '{site.name}' have shape {tuple(draws[site.name].shape)}: "
                f"expected draws first, then {tuple(site.shape)} on the real line"
            )
        parts.append(free.reshape(len(free), -1))
    return torch.cat(parts, -1).to(potential.example)
