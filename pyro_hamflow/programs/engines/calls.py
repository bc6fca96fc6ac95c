"""What a call of machine code is to do, and what it makes: as ``call.hpp`` has it."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor

_FIRST = ("chains", "draws", "slots", "dense", "motion", "threads", "points")
_SECOND = ("tape_length", "refresh", "stretches", "factorises", "blocks")
_PLACES = [
    *("data", "evaluation_data", "root", "step_sizes", "momenta", "along", "uniforms", "tape"),
    *("num_steps", "noise_blocks", "likelihood_blocks", "local_blocks"),
    *("position", "noise", "value", "gradient", "likelihoods", "local"),
    *("positions", "values", "locals", "rate", "error", "energy", "estimate", "share"),
    *("n_steps", "n_densities", "diverging", "limited", "accepted"),
]


class Call(ctypes.Structure):
    """What one call is to do, as machine code reads it."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in (*_FIRST, "seed", "first_draw", *_SECOND)),
        ("correlation", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in _PLACES),
    ]


class Place(NamedTuple):
    """Where chains are; a call moves all of it on in place, without gaps in memory.

    Attributes:
        position: Of shape ``(chains, dimension)``.
        noise: Of shape ``(chains, noise_dimension)``.
        value: The potential, of shape ``(chains,)``.
        gradient: Its gradient in all that trajectories move, ``(chains, dimension)`` or with that
            in the noise behind it.
        likelihoods: The factors of the likelihood estimate, in a row; none if it is not looked at.
        local: The values of local sites, likewise.
    """

    position: Tensor
    noise: Tensor
    value: Tensor
    gradient: Tensor
    likelihoods: Tensor
    local: Tensor


class Motion(IntEnum):
    """How a chain moves, as ``call.hpp`` has it.

    Attributes:
        STRAIGHT: Along a trajectory of given length.
        DOUBLING: Along one that doubles until it turns back.
        WALK: By a normal step, without any gradient.
    """

    STRAIGHT = 0
    DOUBLING = 1
    WALK = 2


class NoiseMoves(NamedTuple):
    """How the noise of an estimate moves after the parameters; and its blocks.

    Attributes:
        refresh: The number of the move, as in ``noise.hpp``; zero where trajectories move it.
        noise_blocks: To which block each number of the noise belongs.
        likelihood_blocks: The same of each factor of the estimate.
        local_blocks: The same of each number of the local sites.
        factorises: Whether blocks are accepted by their own factors.
        blocks: How many there are.
        along: Where along its path each number lies, from zero to one.
        correlation: Of noise with that before it.
        stretches: How many stretches of the path are renewed one after the other.
    """

    refresh: int
    noise_blocks: Tensor
    likelihood_blocks: Tensor
    local_blocks: Tensor
    factorises: bool
    blocks: int
    along: Tensor
    correlation: float = 0.0
    stretches: int = 1


class Request(NamedTuple):
    """What is to be made of each chain's state.

    Attributes:
        root: The square root of the inverse mass: a lower triangle, or a diagonal.
        step_sizes: Of each chain.
        num_steps: For each draw, how many steps its trajectory takes, or may take at most.
        motion: How chains move.
        slots: One more than they may double.
        seed: Of all random numbers.
        first_draw: The number of the first draw: each chain's random numbers depend on it alone.
        threads: How many threads share the chains.
        moves: How noise moves, where it does.
        momenta: Momenta to take in place of random ones, whitened, of all that moves.
        uniforms: Uniform numbers to take likewise, of shape ``(chains, points, 3)``.
        tape: All numbers that come after these, as they are asked for, ``(chains, numbers)``.
    """

    root: Tensor
    step_sizes: Tensor
    num_steps: Tensor
    motion: Motion
    slots: int
    seed: int
    first_draw: int
    threads: int = 1
    moves: NoiseMoves | None = None
    momenta: Tensor | None = None
    uniforms: Tensor | None = None
    tape: Tensor | None = None


class Made(NamedTuple):
    """The draws of one call, of shape ``(chains, draws)`` but for the positions and local sites.

    Attributes:
        positions: Of shape ``(chains, draws, dimension)``.
        values: The potential.
        locals: Values of all local sites, in a row; none if the model is not looked at.
        rate: The probability of acceptance, of trees its mean over their points.
        error: By how much the Hamiltonian grew.
        energy: The Hamiltonian at the draw; of parameters alone, without the noise.
        estimate: The log estimate of the likelihood, where there is one.
        share: The share of the noise that was renewed after the parameters' move.
        n_steps: Steps of the integrator.
        n_densities: Densities evaluated without gradient.
        diverging: Whether the Hamiltonian grew without bound.
        limited: Whether a tree ended because it may not double again.
        accepted: Whether the draw is another one than that before.
    """

    positions: Tensor
    values: Tensor
    locals: Tensor
    rate: Tensor
    error: Tensor
    energy: Tensor
    estimate: Tensor
    share: Tensor
    n_steps: Tensor
    n_densities: Tensor
    diverging: Tensor
    limited: Tensor
    accepted: Tensor

    @staticmethod
    def room(place: Place, draws: int) -> Made:
        """Room for so many draws of chains at some places."""
        shape, position = (len(place.position), draws), place.position

        def zeros(count: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
            return torch.zeros(count, *shape, device="cpu", dtype=dtype).unbind()

        return Made(
            position.new_empty(*shape, position.shape[1]),
            position.new_empty(shape),
            position.new_empty(*shape, place.local.shape[1]),
            *zeros(5, torch.float64),
            *zeros(2, torch.int64),
            *zeros(3, torch.bool),
        )

    def at(self, number: int) -> Made:
        """One draw alone."""
        return Made(*(part[:, number] for part in self))
