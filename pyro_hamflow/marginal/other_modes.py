"""Other modes of the posterior than the one at which chains start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from pyro_hamflow.marginal.climb import NEAR, SAME, Top

_LOWEST = 7.0  # of logarithms, by which another mode's top may be lower to be told: a thousandth
_DEPTH = 3.0  # the same of the ground between, from which on trajectories seldom cross it
_POINTS = 8  # parts of the line between two tops


def other_modes(
    gradient: Callable[[Tensor], tuple[float, Tensor]], best: Top, tops: Sequence[Top]
) -> tuple[float, ...]:
    """How high other modes' tops are, beside the best one, as ratios of densities.

    Climbs of one mode may end apart where it is flat, or bent. So tops are those of two modes only
    where the ground between is lower than either. Where the best climb itself did not come to rest,
    heights tell nothing.

    Arguments:
        gradient: From a position to minus the log density, and its slope.
        best: The highest top.
        tops: Where climbs ended.
    """
    known = [best]
    for top in sorted(tops, key=lambda top: top.value):
        if max(best.distance, top.distance) > NEAR or top.value - best.value > _LOWEST:
            continue
        if all(_depth(gradient, top, other) > _DEPTH for other in known):
            known.append(top)
    return tuple(math.exp(best.value - top.value) for top in known[1:])


def _depth(gradient: Callable[[Tensor], tuple[float, Tensor]], one: Top, two: Top) -> float:
    """By how much the lowest ground on the line between two tops is lower than the lower one."""
    way = two.position - one.position
    if float(way.abs().max()) <= SAME:
        return 0.0
    between = (one.position + way * (part / _POINTS) for part in range(1, _POINTS))
    return max(gradient(position)[0] for position in between) - max(one.value, two.value)


def told_of_modes(ratios: Sequence[float]) -> str:
    """What is said of other modes, by their densities beside the highest one's."""
    listed = " and ".join(f"{ratio:.2g}" for ratio in ratios)
    modes = "another mode, whose top is" if len(ratios) == 1 else "other modes, whose tops are"
    return (
        f"the posterior has {modes} {listed} times as dense as that of the highest one found, near "
        "which all chains start: they may not come to the others, and R-hat cannot tell. Where "
        "these differ by the names of their parts alone, as components of a mixture do, nothing is "
        "lost; else let `FlowNUTS` or `AnnealedSampler` find the modes' shares."
    )
