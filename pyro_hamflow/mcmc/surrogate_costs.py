"""What learning costs, measured."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.training import Points, fit_energy
from pyro_hamflow.mcmc.recorder import synchronize
from pyro_hamflow.model.potential import Potential

_BATCH, _STEPS = 256, 5


def timed(function: Callable[..., Any], *inputs: Tensor) -> float:
    """The seconds that a call takes, the fastest of three after a first."""
    function(*inputs)
    best = math.inf
    for _ in range(3):
        synchronize(inputs[0])
        began = time.perf_counter()
        function(*inputs)
        synchronize(inputs[0])
        best = min(best, time.perf_counter() - began)
    return best


def training_seconds(potential: Potential, hidden: Sequence[int]) -> float:
    """The seconds that a step of a network's training takes."""
    z = torch.randn(_BATCH, potential.dimension).to(potential.example)
    points = Points(z, 0.5 * z.square().sum(-1), z, z[:, :0])
    network = PotentialNetwork(potential.dimension, hidden=hidden).to(z)
    with torch.random.fork_rng():
        return fit_energy(network, points, steps=_STEPS).seconds / _STEPS
