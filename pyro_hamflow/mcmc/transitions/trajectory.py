r"""Trajectories that grow until they turn back, for all chains at once, without recursion.

A trajectory doubles its length, forwards or backwards at random, until it makes a U-turn; its draw
is picked from all its points by their weights. Here it grows point by point. The points are
numbered from the start, which is 0, so that doubling number d adds the points from :math:`2^d` to
:math:`2^{d+1} - 1`. Point n completes a balanced subtree for each trailing one of n in binary; they
begin at the points whose numbers come from n by clearing its trailing ones, one after the other
from the right. A *mark* is kept of each point in the slot that its number of ones names, and so all
these beginnings are at hand when they are needed, in as many slots as there are doublings.

Chains need not be at the same point of their trajectories: the program :func:`extend` moves each by
one step of its own.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import judge
from pyro_hamflow.mcmc.transitions.tree import Motion, Pick, Point, Tree

Selected = TypeVar("Selected", Point, Pick)


def extend(
    tree: Tree,
    motion: Motion,
    noise: Tensor,
    root: Tensor,
    step_size: Tensor,
    limit: Tensor,
    uniform: Tensor,
) -> tuple[Tree, Pick]:
    """Adds a point to the trajectory of each chain that has not ended; returns it too.

    Arguments:
        tree: The trajectories.
        motion: How points move.
        noise: The noise that is held, of shape ``(chains, noise_dimension)``.
        root: The square root of the inverse mass of the parameters.
        step_size: Of each chain, of shape ``(chains,)``.
        limit: The most points that a trajectory may add, a scalar.
        uniform: Uniform random numbers, of shape ``(3, chains)``, in float64.

    Invariant:
        Whether a trajectory ends depends on it only through tests that are symmetric in time and
        made for every balanced subtree, so that each of its points would have led to it with the
        same probability.
    """
    growing = ~tree.done
    number = tree.num_points + growing.long()
    # At the start of a doubling the way leads on from one of the two ends, picked at random.
    doubling = (number & (number - 1)) == 0
    sign = torch.where(doubling, torch.where(uniform[0] < 0.5, 1.0, -1.0), tree.sign)
    onward = sign > 0
    before = _select_all(doubling, _select_all(onward, tree.forward, tree.backward), tree.here)
    far = _select_all(onward, tree.backward, tree.forward)
    signed = torch.where(growing, sign, 0.0).to(step_size) * step_size
    here, value, gradient = motion.step(before, noise, root, signed)

    energy = motion.energy(here, value)
    rate, error, diverging = judge(energy.total - tree.first_energy)

    candidate_log_weight = torch.where(doubling, -torch.inf, tree.candidate_log_weight)
    candidate_log_weight = torch.logaddexp(candidate_log_weight, -error)
    taken = uniform[1].log() < -error - candidate_log_weight
    latest = Pick(here.position, gradient, value, error, energy.parameters)
    candidate = _select_all(taken, latest, tree.candidate)

    momentum, start, last = (p.momentum[: motion.dimension] for p in (here, far, before))
    slots = torch.arange(len(tree.sums), device=number.device)[:, None]
    ones = _count_ones(number, len(slots))
    marked = (slots == ones)[:, None]
    anew = (doubling & (slots == 0))[:, None]
    starts = torch.where(marked, momentum, tree.starts)
    starts = torch.where(anew, start, starts)
    previous = torch.where(marked, last, tree.previous)
    sums = torch.where(marked, tree.momentum_sum, tree.sums)
    momentum_sum = tree.momentum_sum + momentum
    trailing = _count_ones(number ^ (number + 1), len(slots) + 1) - 1
    closed = (slots[:-1] >= ones - trailing) & (slots[:-1] < ones)
    turned = closed & _turned(starts, previous, sums, momentum_sum, momentum)

    complete = (number & (number + 1)) == 0
    broken = diverging | turned[1:].any(0)
    joined = growing & complete & ~broken
    accepted = joined & (uniform[2].log() < candidate_log_weight - tree.log_weight)
    limited = joined & ~turned[0] & (2 * number + 1 > limit)
    log_weight = torch.logaddexp(tree.log_weight, candidate_log_weight)
    # One that has ended stays where it was last; one that diverges, where it was before.
    last_fine = torch.where(growing, before.position, tree.here.position)
    there = torch.where(growing & ~diverging, here.position, last_fine)
    longer = Tree(
        draw=_select_all(accepted, candidate, tree.draw),
        candidate=candidate,
        backward=_select_all(joined & ~onward, here, tree.backward),
        forward=_select_all(joined & onward, here, tree.forward),
        here=here._replace(position=there),
        starts=starts,
        previous=previous,
        sums=sums,
        momentum_sum=momentum_sum,
        log_weight=torch.where(joined, log_weight, tree.log_weight),
        candidate_log_weight=candidate_log_weight,
        first_energy=tree.first_energy,
        rate=tree.rate + torch.where(growing, rate, 0.0),
        sign=sign,
        num_points=number,
        diverging=tree.diverging | (growing & diverging),
        limited=tree.limited | limited,
        done=tree.done | broken | limited | (complete & turned[0]),
    )
    return longer, latest


def _turned(
    starts: Tensor, previous: Tensor, sums: Tensor, momentum_sum: Tensor, end: Tensor
) -> Tensor:
    """Whether the subtrees that begin at each mark and end here turn back, ``(slots - 1, chains)``.

    A subtree of two halves turns back if the sum of its momenta points against the momentum at one
    of its ends, or if the sum of either half and the other's adjoining point does so at its ends.
    The second half begins at the next mark.
    """
    start, middle, last = starts[:-1], starts[1:], previous[1:]
    whole = momentum_sum - sums[:-1]
    left = sums[1:] - sums[:-1] + middle
    right = momentum_sum - sums[1:] + last

    def against(momentum: Tensor, path: Tensor) -> Tensor:
        return (momentum * path).sum(1) <= 0.0

    return (
        against(start, whole)
        | against(end, whole)
        | against(start, left)
        | against(middle, left)
        | against(last, right)
        | against(end, right)
    )


def _count_ones(number: Tensor, digits: int) -> Tensor:
    """How many of the lowest ``digits`` binary digits of each number are ones."""
    places = torch.arange(digits, device=number.device)[:, None]
    return ((number >> places) & 1).sum(0)


def _select_all(mask: Tensor, new: Selected, old: Selected) -> Selected:
    """The new values of the chains under the mask, and the old ones of the others."""
    return type(new)(*(torch.where(mask, a, b) for a, b in zip(new, old, strict=True)))
