"""Starts that lie far out come down to where chains find their own way."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.programs.capture import Program

_STEPS = 10  # downhill, between one look and the next at whether they are worth it
_ROUNDS = 30
_WORTH = 10.0  # nats for each parameter, that so many steps have to gain
_RADIUS = 0.1  # how far a first step goes in the coordinate in which it goes furthest
_LONGER, _SHORTER = 1.5, 0.5  # a radius after a step that led downwards, and one that did not


def come_down(gradient: Program, position: Tensor, noise: Tensor) -> Tensor:
    """Positions of the same basins, of which the potential is no longer huge.

    Where rates are exponentials of sums, a box of starts reaches up to potentials of 10 to the
    twelfth. A chain that falls from there takes hundreds of iterations, and what step size and mass
    are learned from meanwhile is the fall of the furthest of all chains. So those go straight
    downhill first, for as long as this gains much. Starts for which it never does are left as they
    are, and none comes near a mode or the neck of a funnel, where little is gained.

    Arguments:
        gradient: Gives potentials, of shape ``(chains,)``, and their gradients, of positions and
            noise.
        position: Where chains start, of shape ``(chains, dimension)``; their potentials are finite.
        noise: Of shape ``(chains, noise_dimension)``, held.

    Returns:
        Positions of the same shape.
    """
    if not position.shape[1]:
        return position  # of a model of which nothing is to be sampled
    value, slope, *_ = gradient(position, noise)
    radius = torch.full_like(value, _RADIUS)
    falls = torch.ones_like(value, dtype=torch.bool)
    for _ in range(_ROUNDS):
        start, before = position, value
        for _ in range(_STEPS):
            steepest = slope.abs().amax(-1).clamp(min=torch.finfo(slope.dtype).tiny)
            there = position - ((radius / steepest)[:, None] * slope).to(position)
            new_value, new_slope, *_ = gradient(there, noise)
            better = falls & (new_value < value) & new_slope.isfinite().all(-1)
            position = torch.where(better[:, None], there, position)
            slope = torch.where(better[:, None], new_slope, slope)
            value = torch.where(better, new_value, value)
            radius = torch.where(better, _LONGER * radius, _SHORTER * radius)
        falls = falls & (before - value > _WORTH * position.shape[1])
        position = torch.where(falls[:, None], position, start)
        if not falls.any():
            break
    return position
