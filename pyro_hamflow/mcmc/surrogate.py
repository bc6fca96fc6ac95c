r"""Trajectories that follow a learned energy, and draws that are the true posterior's.

A learned gradient that depends on the position alone moves points reversibly and without change of
volume, so it may stand in for the true one wherever the true energy has the last word. There are
two ways to give it that. *Per leaf*, every point of a trajectory is weighted by its true energy.
*At the endpoint*, whole transitions are made that are reversible for the learned density
:math:`e^{-S}`, and their outcome z' is accepted once, with probability

.. math:: \min(1, e^{-U(z') + S(z') + U(z) - S(z)}),

which takes one true energy for the draw and no gradient at all.

Whether to trust the learned gradient somewhere may depend on where that is, and on nothing else.
A test of how large the energy error of the trajectory has been so far, the online monitoring of the
literature, is a test of its history: undone, the trajectory would switch elsewhere, or not at all,
so that it is not reversible, and its draws are biased whatever is done at the end.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.mcmc.pseudo_marginal import ConditionalTransition
from pyro_hamflow.mcmc.refresh import Refresh
from pyro_hamflow.mcmc.transition import (
    Info,
    ParameterTransition,
    State,
    Tuning,
    draw_level,
    metropolis,
    select,
    select_evaluation,
)
from pyro_hamflow.model.capture import Program
from pyro_hamflow.model.potential import Potential

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
        passing: Whether it will soon be replaced, so that it is not compiled.
    """

    noise_dimension = 0

    def __init__(
        self, potential: Potential, network: PotentialNetwork, *, passing: bool = False
    ) -> None:
        super().__init__(potential)
        self.network = frozen(network, potential.example)
        self.passing = passing
        self._name = f"surrogate {next(_serial)}"

    def graph(self, kind: str, num_chains: int) -> Program:
        """Energy and gradient of every chain."""

        def gradient(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            return self.network.value_and_gradient(position)

        return gradient

    def vectors(self, num_chains: int) -> tuple[Tensor, Tensor]:
        """Positions, and noise of no dimensions, to capture programs with."""
        position = self.potential.vectors(num_chains)[0]
        return position, position[:, :0]

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Compiles a function around the network's, if the potential compiles its own."""
        if self.passing:
            return function
        return self.potential.accelerate(f"{name}, {self._name}", function, *examples)


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

    Attributes:
        asked: Which chains asked for the true gradient, call by call.
    """

    def __init__(
        self, potential: Potential, network: PotentialNetwork, trust: TrustRegion | None
    ) -> None:
        super().__init__(potential)
        self.network = frozen(network, potential.example)
        self.trust = trust
        self.asked: list[Tensor] = []
        self._name = f"judged {next(_serial)}"

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
        evaluate = potential.program("evaluate", num_chains)
        true = potential.program("gradient", num_chains)
        trust = self.trust

        def gated(position: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            slope = self.network.value_and_gradient(position)[1]
            share = trust.share(self.network, position)
            self.asked.append(share[:, 0] > 0.0)
            if not bool((share > 0.0).any()):
                return evaluate(position, noise, uniform)[0], slope
            value, true_slope = true(position, noise)
            return value, torch.where(share > 0.0, torch.lerp(slope, true_slope, share), slope)

        return gated

    def accelerate(self, name: str, function: Program, *examples: Tensor) -> Program:
        """Compiles the function, unless what it does depends on where chains are."""
        if self.trust is not None:
            return function
        return self.potential.accelerate(f"{name}, {self._name}", function, *examples)


class EndpointTransition:
    r"""Moves by transitions on a learned density, and accepts where they end.

    Noise moves by :math:`u' = \rho u + \sqrt{1 - \rho^2}\, \epsilon`, which is reversible for its
    law N(0, I), and one estimate at the end corrects both moves at once.

    Arguments:
        potential: The true one.
        surrogate: The learned density.
        inner: A transition that is reversible for it.
        num_transitions: How many of these are made for one true energy.
        correlation: :math:`\rho`, of the noise before and after.

    Attributes:
        observer: Called with each proposal and its noise, while a surrogate is being learned.
        inner_rate: The acceptance rate within the latest transitions, to tune them by.

    Invariant:
        The density exp(-U(z, u)) N(u; 0, I) of positions and noise, exactly, whatever the network.

    References:
        | Surrogate transitions: Monte Carlo Strategies in Scientific Computing (Liu, 2001), 9.4.3
        | The correlated pseudo-marginal method (Deligiannidis, Doucet, Pitt, 2018)
        | https://arxiv.org/abs/1511.04992
    """

    def __init__(
        self,
        potential: Potential,
        surrogate: SurrogateDensity,
        inner: ParameterTransition,
        *,
        num_transitions: int,
        correlation: float,
    ) -> None:
        self.potential = potential
        self.surrogate = surrogate
        self.inner = inner
        self.num_transitions = num_transitions
        self.correlation = correlation
        self.observer: Callable[[Tensor, Tensor], object] | None = None
        self.inner_rate: Tensor | None = None

    def begin(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.potential.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    def propose(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Tensor, Info]:
        """Where the learned density's transitions end, the gain in its energy, what happened."""
        start = end = self.inner.begin(state.position, state.noise[:, :0])
        steps = torch.zeros(len(state.position), dtype=torch.long, device=state.position.device)
        for _ in range(self.num_transitions):
            end, info = self.inner.step(end, tuning, num_steps)
            steps = steps + info.n_steps
        gain = end.evaluation.value.double() - start.evaluation.value.double()
        return end, gain, info._replace(n_steps=steps)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        end, gain, info = self.propose(state, tuning, num_steps)
        self.inner_rate = info.acceptance_rate
        noise = state.noise
        if noise.shape[1]:
            fresh = math.sqrt(1.0 - self.correlation**2) * torch.randn_like(noise)
            noise = self.correlation * noise + fresh
        if self.observer is not None:
            self.observer(end.position, noise)
        there = self.potential.evaluate(end.position, noise)
        error = (there.value.double() - state.evaluation.value.double()) - gain
        decision = metropolis(error, draw_level(len(noise), noise.device))
        accepted = decision.accepted
        evaluation = select_evaluation(accepted, there, state.evaluation)
        moved = State(
            select(accepted, end.position, state.position),
            select(accepted, noise, state.noise),
            state.gradient,
            evaluation,
        )
        kinetic = info.energy - end.evaluation.value.double()
        count = torch.zeros_like(accepted, dtype=torch.long)
        info = info._replace(
            **decision._asdict(),
            energy=evaluation.value.double() + kinetic,
            n_gradients=count,
            n_densities=count + 1,
            refresh_rate=accepted.double() if noise.shape[1] else None,
            surrogate_accepted=accepted,
            surrogate_error=error,
        )
        return moved, info


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
