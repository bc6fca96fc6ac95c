"""A learned energy in the place of the true one.

A learned gradient that depends on the position alone moves points reversibly and without change of
volume, so it may stand in for the true one wherever the true energy has the last word. There are
two ways to give it that. *Per leaf*, every point of a trajectory is weighted by its true energy.
*At the endpoint*, whole transitions are made that are reversible for the learned density, and
weighed by the true energy where they end.

Whether to trust the learned gradient somewhere may depend on where that is, and on nothing else.
A test of how large the energy error of the trajectory has been so far, the online monitoring of the
literature, is a test of its history: undone, the trajectory would switch elsewhere, or not at all,
so that it is not reversible, and its draws are biased whatever is done at the end.
"""

from __future__ import annotations

import copy
import itertools
import math
import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_serial = itertools.count()


class StandIn:
    """A potential with another gradient; everything else is the true one's.

    Arguments:
        potential: The true one.
    """

    def __init__(self, potential: Potential) -> None:
        self.potential = potential

    def __getattr__(self, name: str) -> Any:
        return getattr(self.potential, name)


class SurrogateDensity(StandIn):
    """A learned energy in the place of a potential.

    Arguments:
        potential: The true one, which lends its shapes and its compiler.
        network: The learned energy, to be frozen.
        calls: How many steps along it are foreseen: it is not compiled for a few.

    Attributes:
        level: The energy from which on it grows half as fast as the network's, over a nat or two;
            infinite at first. A density whose tails are too light holds draws there for long. It
            may be changed in place, until a run begins: programs follow.
    """

    noise_dimension = 0

    def __init__(
        self,
        potential: Potential,
        network: PotentialNetwork,
        *,
        calls: float = math.inf,
    ) -> None:
        super().__init__(potential)
        self.network = frozen(network, potential.example)
        self.calls = calls
        self.level = potential.example.new_tensor(math.inf)
        self._name = name_programs_of(self, "surrogate")

    def graph(self, kind: str, num_chains: int) -> Program:
        """Energy and gradient of every chain."""

        def gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = self.network.value_and_gradient(position)
            above = value - self.level
            share = 1.0 - 0.5 * above.sigmoid()
            return value - 0.5 * softplus(above), share[:, None] * slope

        return gradient

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions, and noise of no dimensions, to capture programs with."""
        position = self.potential.vectors(num_chains)[0]
        return position, position[:, :0]

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """What the potential does with a function, for one around the network."""
        name = f"{name}, {self._name}"
        return self.potential.accelerate(name, function, *examples, calls=self.calls)


def name_programs_of(stand_in: StandIn, kind: str) -> str:
    """A name for the programs around a stand-in, which the potential forgets with it."""
    name = f"{kind} {next(_serial)}"
    weakref.finalize(stand_in, stand_in.potential.forget, name).atexit = False
    return name


def frozen(network: PotentialNetwork, example: Tensor) -> PotentialNetwork:
    """A copy of a network, of an example's type and on its device, that no training changes."""
    return copy.deepcopy(network).to(example).eval().requires_grad_(False)


class TrustRegion(NamedTuple):
    """Where a learned gradient is trusted: a ball in whitened coordinates, with a soft edge.

    Attributes:
        radius: Within which the learned gradient alone is followed.
        edge: Beyond which the true one alone is.
    """

    radius: float
    edge: float

    def share(self, network: PotentialNetwork, position: Tensor) -> Tensor:
        """The true gradient's share in the force at positions, of shape ``(chains, 1)``."""
        distance = network.whitened(position).square().sum(-1, keepdim=True).sqrt()
        t = ((distance - self.radius) / (self.edge - self.radius)).clamp(0.0, 1.0)
        return t * t * (3.0 - 2.0 * t)


class JudgedDensity(StandIn):
    """The true energy with a learned gradient: what a transition per leaf asks of a potential.

    Arguments:
        potential: The true one.
        network: The learned energy, to be frozen.
        trust: Where the learned gradient is trusted; everywhere if not given.
        calls: How many steps are foreseen: programs are not compiled for a few.

    Attributes:
        asked: Which chains asked for the true gradient, call by call.
    """

    def __init__(
        self,
        potential: Potential,
        network: PotentialNetwork,
        trust: TrustRegion | None,
        *,
        calls: float = math.inf,
    ) -> None:
        super().__init__(potential)
        self.network = frozen(network, potential.example)
        self.trust = trust
        self.calls = calls
        self.asked: list[Tensor] = []
        self._name = name_programs_of(self, "judged")

    def graph(self, kind: str, num_chains: int) -> Program:
        """The true energy, and the gradient that is followed, of every chain."""
        potential = self.potential
        uniform = self.example.new_full((num_chains, potential.num_choices), 0.5)
        if self.trust is None:
            evaluate = potential.graph("evaluate", num_chains)

            def plain(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                value = evaluate(position, noise, uniform)[0]
                return value, self.network.value_and_gradient(position)[1]

            return plain
        trust = self.trust

        def gated(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            slope = self.network.value_and_gradient(position)[1]
            share = trust.share(self.network, position)
            self.asked.append(share[:, 0] > 0.0)
            evaluate = potential.program("evaluate", num_chains, self.calls)
            true = potential.program("gradient", num_chains, self.calls)
            if not bool((share > 0.0).any()):
                return evaluate(position, noise, uniform)[0], slope
            value, true_slope = true(position, noise)
            return value, torch.where(share > 0.0, torch.lerp(slope, true_slope, share), slope)

        return gated

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """What the potential says."""
        return self.potential.evaluate(position, noise, calls=self.calls)

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Compiles the function, unless what it does depends on where chains are."""
        if self.trust is not None:
            return function
        name = f"{name}, {self._name}"
        return self.potential.accelerate(name, function, *examples, calls=self.calls)
