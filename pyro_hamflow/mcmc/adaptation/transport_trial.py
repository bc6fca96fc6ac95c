"""What moves in a map's coordinates are worth beside plain ones, by iterations of both.

Costs are counted in operations, not by a clock, so that a run that is repeated decides alike.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Info
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.transported import TransportedTarget

# The divergence of the worst plain coordinate, below which all are about normal: a logistic
# regression at .11 gained nothing, eight schools without a funnel at .73 more draws per gradient.
_NORMAL = 0.15
_WORTH = 0.5  # of the divergence in plain coordinates, below which a map's has to be
_LEAST = 1e-3  # of an independent draw, that one is worth where it cannot be told


def far_objection(learned: float, plain: float, worst: float) -> str | None:
    """Why a map is not worth a trial, by how far it leaves the posterior from a normal density.

    Arguments:
        learned: The divergence in its coordinates.
        plain: That in plain ones.
        worst: That of the worst of these alone.
    """
    if worst < _NORMAL:
        return f"the posterior is about normal (divergence {plain:.2g})"
    if not learned < _WORTH * plain:
        return (
            f"the one that was learned is hardly nearer to a normal density (divergence "
            f"{learned:.2g}) than plain coordinates are ({plain:.2g})"
        )
    return None


class Moves:
    """Iterations of one kind of move, as they are made.

    Arguments:
        target: In whose coordinates; none for the model's own.
    """

    def __init__(self, target: TransportedTarget | None) -> None:
        self.target = target
        self._positions: list[Tensor] = []
        self._gradients: list[float] = []

    def note(self, position: Tensor, info: Info) -> None:
        """Takes in an iteration, and where it led.

        All chains wait for the one that takes most gradients.
        """
        self._positions.append(position)
        self._gradients.append(float(torch.as_tensor(info.n_gradients).max()))

    @property
    def gradients(self) -> float:
        """How many an iteration takes, in the second half."""
        later = self._gradients[len(self._gradients) // 2 :]
        return sum(later) / len(later)

    def positions(self) -> Tensor:
        """The model's positions in the second half, ``(iterations, chains, dimension)``."""
        rows = torch.stack(self._positions[len(self._positions) // 2 :])
        if self.target is None:
            return rows
        return self.target.positions(rows.flatten(0, 1))[0].reshape(rows.shape)


class Worth(NamedTuple):
    """What one kind of move costs, and what it brings.

    Attributes:
        draw: What share of an independent draw one is.
        gradients: How many a draw takes.
        seconds: That each of them takes, by its operations; what it takes to grow a trajectory by
            one point included.
    """

    draw: float
    gradients: float
    seconds: float

    @property
    def rate(self) -> float:
        """Independent draws in a second."""
        return self.draw / (self.gradients * self.seconds)


class TransportVerdict(NamedTuple):
    """Whether moves along a map pay.

    Attributes:
        mapped: What they are worth.
        plain: What plain ones are.
    """

    mapped: Worth
    plain: Worth

    def objection(self) -> str | None:
        """Why plain moves are worth as much, if they are."""
        mapped, plain = self
        if mapped.rate > plain.rate:
            return None
        return (
            f"a draw along it takes {mapped.gradients:.1f} gradients, each the work of "
            f"{mapped.seconds / plain.seconds:.1f} plain ones, and is worth {mapped.draw:.2f} "
            f"independent draws; a plain one takes {plain.gradients:.1f} and is worth "
            f"{plain.draw:.2f}"
        )


def compare(
    potential: Potential, target: TransportedTarget, mapped: Moves, plain: Moves
) -> TransportVerdict:
    """What moves along a map are worth, and plain ones.

    Both are judged by the map's coordinates and by their distance from the middle.

    Arguments:
        potential: The target of plain moves.
        target: The potential seen through the map.
        mapped: Moves along it, or along one that led to it.
        plain: Plain ones, from where those ended.
    """
    rows = [_judged(target, moves.positions()) for moves in (mapped, plain)]
    variance = torch.cat([part.flatten(0, 1) for part in rows]).var(0)
    programs = potential.programs
    costs = [programs.seconds_of(owner) for owner in (mapped.target, potential)]
    if not all(costs):  # a model that runs in Python takes its time wherever it runs
        costs = [1.0, 1.0]
    return TransportVerdict(
        *(
            Worth(_draw(part, variance), moves.gradients, cost)
            for part, moves, cost in zip(rows, (mapped, plain), costs, strict=True)
        )
    )


def _judged(target: TransportedTarget, positions: Tensor) -> Tensor:
    """Coordinates and their squared norm, ``(iterations, chains, dimension + 1)``."""
    z = target.coordinates(positions.flatten(0, 1)).double().reshape(positions.shape)
    return torch.cat([z, z.square().sum(-1, keepdim=True)], -1)


def _draw(rows: Tensor, variance: Tensor) -> float:
    """What share of an independent draw each is: as of a chain with the slowest autocorrelation."""
    moved = 0.5 * (rows[1:] - rows[:-1]).square().mean((0, 1)) / variance
    slowest = float(moved.nan_to_num(0.0).clamp(_LEAST, 1.0).min())
    return slowest / (2.0 - slowest)
