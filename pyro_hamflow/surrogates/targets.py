"""Targets that are made of a learned energy.

A learned gradient that depends on the position alone moves points reversibly and without change of
volume, so it may stand in for the true one wherever the true energy has the last word. There are
two ways to give it that. *Per leaf*, every point of a trajectory is weighted by its true energy
(:class:`JudgedDensity`). *At the endpoint*, whole transitions are made that are reversible for the
learned density (:class:`SurrogateDensity`), and weighed by the true energy where they end.

Whether to trust the learned gradient somewhere may depend on where that is, and on nothing else.
A test of how large the energy error of the trajectory has been so far, the online monitoring of the
literature, is a test of its history: undone, the trajectory would switch elsewhere, or not at all,
so that it is not reversible, and its draws are biased whatever is done at the end.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.functional import softplus

from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.surrogates.potential_network import PotentialNetwork


class SurrogateDensity:
    """A learned energy in the place of a potential: a target without noise.

    Arguments:
        potential: The true one, which lends its shapes and its compiler.
        network: The learned energy, to be frozen.

    Attributes:
        softened_above: The energy, a scalar, above which this density's grows half as fast as the
            network's (the change takes a nat or two); infinite at first. A density whose tails are
            too light holds draws there for long. It may be changed in place, until a run begins:
            programs follow.
    """

    noise_dimension = 0

    def __init__(self, potential: Potential, network: PotentialNetwork) -> None:
        self.dimension, self.example = potential.dimension, potential.example
        self.network = frozen(network, potential.example)
        self.softened_above = potential.example.new_tensor(math.inf)
        self._potential = potential

    def graph(self, kind: str, num_chains: int) -> Program:
        """Energy and gradient of every chain."""

        def value_and_gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self.network.value_and_gradient(position)
            above = value - self.softened_above
            share = 1.0 - 0.5 * above.sigmoid()
            return value - 0.5 * softplus(above), share[:, None] * gradient

        return value_and_gradient

    def chain_graph(self) -> GraphModule:
        """The same of one chain, captured."""
        known = _graphs.get(self)
        if known is None:
            program, (position, noise) = self.graph("gradient", 1), self.vectors(1)

            def of_one(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                value, gradient = program(position[None], noise[None])
                return value[0], gradient[0]

            known = _graphs[self] = capture(of_one, position[0], noise[0])
        return known

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions, and noise of no dimensions, to capture programs with."""
        position = self._potential.vectors(num_chains)[0]
        return position, position[:, :0]

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Captures a function, and compiles it where the potential's own are."""
        return self._potential.programs.accelerate(self, name, function, *examples)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """The learned energy alone."""
        return Evaluation(self.graph("gradient", len(position))(position, noise)[0], {}, {})


_graphs: WeakKeyDictionary[SurrogateDensity, GraphModule] = WeakKeyDictionary()


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


class JudgedDensity:
    """The true energy with a learned gradient: the target of a transition per leaf.

    Arguments:
        potential: The true one.
        network: The learned energy, to be frozen.
        trust: Where the learned gradient is trusted; everywhere if not given.

    Attributes:
        asked: Which chains asked for the true gradient, call by call.
    """

    def __init__(
        self, potential: Potential, network: PotentialNetwork, trust: TrustRegion | None
    ) -> None:
        self.dimension, self.example = potential.dimension, potential.example
        self.noise_dimension = potential.noise_dimension
        self.network = frozen(network, potential.example)
        self.trust = trust
        self.asked: list[Tensor] = []
        self._potential = potential

    def graph(self, kind: str, num_chains: int) -> Program:
        """The true energy, and the gradient that is followed, of every chain."""
        potential = self._potential
        uniform = self.example.new_full((num_chains, potential.recovery.num_choices), 0.5)
        if self.trust is None:
            evaluate = potential.graph("evaluate", num_chains)

            def plain(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
                value = evaluate(position, noise, uniform)[0]
                return value, self.network.value_and_gradient(position)[1]

            return plain
        trust = self.trust

        def gated(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            gradient = self.network.value_and_gradient(position)[1]
            share = trust.share(self.network, position)
            self.asked.append(share[:, 0] > 0.0)
            if not bool((share > 0.0).any()):
                evaluate = potential.programs.program("evaluate", num_chains)
                return evaluate(position, noise, uniform)[0], gradient
            true = potential.programs.program("gradient", num_chains)
            value, true_gradient = true(position, noise)
            mixed = torch.lerp(gradient, true_gradient, share)
            return value, torch.where(share > 0.0, mixed, gradient)

        return gated

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions and noise to capture programs with."""
        return self._potential.vectors(num_chains)

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Captures the function, unless what it does depends on where chains are."""
        if self.trust is not None:
            return function
        return self._potential.programs.accelerate(self, name, function, *examples)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """What the true potential says."""
        return self._potential.evaluate(position, noise)


def frozen(network: PotentialNetwork, example: Tensor) -> PotentialNetwork:
    """A copy of a network, of an example's type and on its device, that no training changes."""
    return copy.deepcopy(network).to(example).eval().requires_grad_(False)
