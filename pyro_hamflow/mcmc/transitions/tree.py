"""The trajectories of all chains while they grow: their points, their ends, what was picked.

Vectors are columns here, chains last: masks of chains then apply to them as they are, and sums over
their coordinates add whole rows, which compiles to code that is three times as fast for many
chains.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Point(NamedTuple):
    """A point of each chain's trajectory; each of shape ``(dimension, chains)``.

    Attributes:
        position: Parameters, and behind them the noise, if it moves.
        momentum: Their momenta, those of the parameters in the coordinates where they are N(0, I).
        gradient: The potential's gradient in the same coordinates.
    """

    position: Tensor
    momentum: Tensor
    gradient: Tensor


class Energy(NamedTuple):
    """The Hamiltonian of each chain, of shape ``(chains,)``, in float64.

    Attributes:
        total: What the moves keep.
        parameters: The part without the noise's own energy.
    """

    total: Tensor
    parameters: Tensor


class Pick(NamedTuple):
    """A point picked from a trajectory by its weight.

    Attributes:
        position: Of shape ``(dimension, chains)``.
        gradient: The potential's gradient, in plain coordinates.
        value: The potential, of shape ``(chains,)``.
        error: By how much the Hamiltonian exceeds that of the trajectory's start.
        energy: The Hamiltonian of the parameters alone.
    """

    position: Tensor
    gradient: Tensor
    value: Tensor
    error: Tensor
    energy: Tensor


class Motion(NamedTuple):
    """How points move, and what their energy is.

    Attributes:
        step: From a point, the held noise, the root of the inverse mass and a signed step size for
            each chain to the next point, and the potential and its plain gradient there.
        whiten: From the root of the inverse mass and a gradient to its whitened coordinates.
        energy: From a point and its potential to the Hamiltonian.
        dimension: How many of the coordinates are parameters, whose U-turn ends a trajectory.
    """

    step: Callable[[Point, Tensor, Tensor, Tensor], tuple[Point, Tensor, Tensor]]
    whiten: Callable[[Tensor, Tensor], Tensor]
    energy: Callable[[Point, Tensor], Energy]
    dimension: int


class Tree(NamedTuple):
    """The trajectory of each chain, as far as it has grown; chains are the last dimension of all.

    Attributes:
        draw: Picked from the trajectory.
        candidate: Picked from the doubling that is under way.
        backward: The trajectory's first end.
        forward: Its last end.
        here: The latest point; of a trajectory that diverged, the position before it did.
        starts: Marks, of shape ``(slots, dimension, chains)``: the parameters' momenta there.
        previous: Marks: their momenta one point before.
        sums: Marks: the sum of all their momenta before.
        momentum_sum: The sum of all the parameters' momenta, of shape ``(dimension, chains)``.
        log_weight: Logarithm of the trajectory's weight, relative to its start.
        candidate_log_weight: The same of the doubling that is under way.
        first_energy: The Hamiltonian at the start.
        rate: The sum of the acceptance probabilities of all points.
        sign: Whether the trajectory grows forwards, 1, or backwards, -1.
        num_points: How many points were added.
        diverging: Whether the trajectory ended because the Hamiltonian grew without bound.
        limited: Whether it ended because it may not double again.
        done: Whether it has ended.
    """

    draw: Pick
    candidate: Pick
    backward: Point
    forward: Point
    here: Point
    starts: Tensor
    previous: Tensor
    sums: Tensor
    momentum_sum: Tensor
    log_weight: Tensor
    candidate_log_weight: Tensor
    first_energy: Tensor
    rate: Tensor
    sign: Tensor
    num_points: Tensor
    diverging: Tensor
    limited: Tensor
    done: Tensor

    def flatten(self) -> tuple[Tensor, ...]:
        """All tensors of the tree in one tuple, as programs take them."""
        return tuple(
            tensor for part in self for tensor in ((part,) if isinstance(part, Tensor) else part)
        )

    @staticmethod
    def unflatten(tensors: tuple[Tensor, ...]) -> Tree:
        """The tree of such a tuple."""
        rest = iter(tensors)

        def pick() -> Pick:
            return Pick(*itertools.islice(rest, len(Pick._fields)))

        def point() -> Point:
            return Point(*itertools.islice(rest, len(Point._fields)))

        return Tree(pick(), pick(), point(), point(), point(), *rest)


def tree_of_one_point(
    start: Point, value: Tensor, motion: Motion, root: Tensor, marks: Tensor
) -> Tree:
    """Trajectories of one point.

    Arguments:
        start: The points, with the potential's gradient in plain coordinates.
        value: The potential there.
        motion: How points move.
        root: The square root of the inverse mass of the parameters.
        marks: Zeros, of shape ``(slots, dimension, chains)``: room for as many doublings as slots,
            less one.
    """
    first = start._replace(gradient=motion.whiten(root, start.gradient))
    energy = motion.energy(first, value)
    zero = torch.zeros_like(energy.total)
    none = torch.zeros_like(value, dtype=torch.bool)
    pick = Pick(start.position, start.gradient, value, zero, energy.parameters)
    return Tree(
        draw=pick,
        candidate=pick,
        backward=first,
        forward=first,
        here=first,
        starts=marks,
        previous=marks,
        sums=marks,
        momentum_sum=start.momentum[: motion.dimension],
        log_weight=zero,
        candidate_log_weight=zero,
        first_energy=energy.total,
        rate=zero,
        sign=zero,
        num_points=none.long(),
        diverging=none,
        limited=none,
        done=none,
    )


def deepened(tree: Tree, max_depth: int) -> Tree:
    """The same trajectories with marks for up to ``max_depth`` doublings."""
    more = max_depth + 1 - len(tree.sums)

    def padded(marks: Tensor) -> Tensor:
        return torch.cat([marks, marks.new_zeros(more, *marks.shape[1:])])

    starts, previous, sums = (padded(m) for m in (tree.starts, tree.previous, tree.sums))
    return tree._replace(starts=starts, previous=previous, sums=sums)
