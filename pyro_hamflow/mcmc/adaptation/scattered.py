"""Whether chains that start anywhere come to where a population is.

A population that descends from few of its first particles may have found by luck where it is, and
missed what else there is; mostly, though, moves on its way were only too short for particles to
forget each other, as they are of hierarchical models of tens of coordinates. Chains that start
elsewhere tell: where they come to the same places as the population's own, and all of them soon
forget where they were, nothing was missed that chains find.
"""

from __future__ import annotations

import math

import torch

from pyro_hamflow.mcmc.adaptation.walkers import Walkers
from pyro_hamflow.model.start import find_start
from pyro_hamflow.smc.annealing import Population

_EXCESS = 4.0  # of a population's lineages, from which on luck may have led it where it is
_CHAINS = 100  # half of them from the population
_MOVES = 25  # in which chains have come from far away, mostly
_TRIES = 5  # as many moves again, as a chain that is late looks like one that stays


def leaves_open(population: Population, walkers: Walkers, slow: float) -> bool:
    """Whether there may be more than one mode, where walkers from a population soon forget.

    Arguments:
        population: Made in haste, to look around.
        walkers: From it, their moves tuned; they stay where they are.
        slow: The persistence from which on walkers would not forget.
    """
    if len(population.found) > 1:
        return True
    return population.lineages.excess > _EXCESS and not _lead_to_the_same(walkers, slow)


def _lead_to_the_same(walkers: Walkers, slow: float) -> bool:
    """Whether walkers and others that start anywhere soon forget where they were, all alike."""
    count = walkers.few(_CHAINS)
    kept = count // 2
    try:
        start, its_noise = find_start(walkers.potential, count - kept)
    except ValueError:  # there is no place of finite density
        return False
    position, noise = walkers.state.position[:kept], walkers.state.noise[:kept]
    both = walkers.at(torch.cat([position, start]), torch.cat([noise, its_noise]))
    level = float(both.state.evaluation.value[:kept].max())
    for _ in range(_TRIES):
        both.approach(_MOVES, level)
        if both.persistence() < slow:
            return True
        level = -math.inf  # those that are late have all the moves
    return False
