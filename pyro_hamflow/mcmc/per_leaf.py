"""Trajectories along a learned gradient, every point weighted by its true energy."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.mcmc.pseudo_marginal import ConditionalTransition
from pyro_hamflow.mcmc.refresh import Refresh
from pyro_hamflow.mcmc.surrogate import StandIn, frozen, name_programs_of
from pyro_hamflow.mcmc.transition import Info, ParameterTransition, State, Tuning
from pyro_hamflow.model.capture import Program
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation


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


class PerLeafTransition:
    """Moves along a learned gradient, every point weighted by its true energy.

    Arguments:
        potential: The true one.
        density: Its energy with the learned gradient.
        inner: The transition on that.

    Invariant:
        What the inner transition keeps, exactly, whatever the network: the force is a function of
        the position alone, and the energy is the true one.

    References:
        | Neural network gradient Hamiltonian Monte Carlo (Li, Holbrook, Shahbaba, Baldi, 2017)
        | https://arxiv.org/abs/1711.05307
    """

    def __init__(
        self, potential: Potential, density: JudgedDensity, inner: ParameterTransition
    ) -> None:
        self.potential = potential
        self.density = density
        self.inner = inner

    def begin(self, position: Tensor, noise: Tensor) -> State:
        return self.inner.begin(position, noise)

    def refreshed(self, state: State, tuning: Tuning) -> State:
        return self.inner.refreshed(state, tuning)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        network = self.density.network
        self.density.asked.clear()
        moved, info = self.inner.step(state, tuning, num_steps)
        count = torch.zeros_like(info.accepted, dtype=torch.long)
        steps = info.n_steps + count
        for i, asked in enumerate(self.density.asked):
            count = count + (asked & (i < steps))  # a trajectory that has ended asks for nothing
        before, after = network(state.position), network(moved.position)
        gain = moved.evaluation.value.double() - state.evaluation.value.double()
        info = info._replace(
            n_steps=steps,
            n_gradients=count,
            n_densities=steps,
            surrogate_accepted=info.accepted,
            surrogate_error=gain - (after.double() - before.double()),
        )
        return moved, info


class PerLeafConditionalTransition(ConditionalTransition):
    """Moves parameters per leaf with the noise held, then refreshes the noise.

    Arguments:
        inner: The move of the parameters.
        refresh: The move of the noise.

    Invariant:
        As of :class:`~pyro_hamflow.mcmc.pseudo_marginal.ConditionalTransition`.
    """

    def __init__(self, inner: PerLeafTransition, refresh: Refresh) -> None:
        super().__init__(inner, refresh)
        self.density = inner.density

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        moved, info = super().step(state, tuning, num_steps)
        # At the renewed noise, the energy is a density, and the gradient mostly learned.
        asked = self.density.asked[-1].long() if self.density.trust is not None else 0
        count = info.n_gradients - 1 + asked
        return moved, info._replace(n_gradients=count, n_densities=info.n_densities + 1)
