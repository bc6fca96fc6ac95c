"""Trajectories along a learned gradient, every point weighted by its true energy."""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Info, ParameterTransition, State, Tuning
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, Refresh
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.model.target import Target
from pyro_hamflow.surrogates.targets import JudgedDensity


class PerLeafTransition:
    """Moves along a learned gradient, every point weighted by its true energy.

    Arguments:
        density: The true energy with the learned gradient.
        inner: The transition on that.

    Invariant:
        What the inner transition leaves invariant, exactly, whatever the network: the force is a
        function of the position alone, and the energy is the true one.

    References:
        | Neural network gradient Hamiltonian Monte Carlo (Li, Holbrook, Shahbaba, Baldi, 2017)
        | https://arxiv.org/abs/1711.05307
    """

    def __init__(self, density: JudgedDensity, inner: ParameterTransition) -> None:
        self.target: Target = density
        self.density = density
        self.inner = inner

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        return self.inner.state_at(position, noise)

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
        )
        error = gain - (after.double() - before.double())
        return moved, info.adding(surrogate_accepted=info.accepted, surrogate_error=error)


class PerLeafConditionalTransition(ConditionalTransition):
    """Moves parameters per leaf with the noise held, then refreshes the noise.

    Arguments:
        inner: The move of the parameters.
        refresh: The move of the noise.
        blocks: Which parts of the noise are accepted together.

    Invariant:
        As of :class:`~pyro_hamflow.mcmc.transitions.pseudo_marginal.ConditionalTransition`.
    """

    def __init__(self, inner: PerLeafTransition, refresh: Refresh, blocks: Blocks) -> None:
        super().__init__(inner, refresh, blocks)
        self.density = inner.density

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        moved, info = super().step(state, tuning, num_steps)
        # At renewed noise: a true energy, and a true gradient outside the trusted region alone.
        asked = self.density.asked[-1].long() if self.density.trust is not None else 0
        count = info.n_gradients - 1 + asked
        return moved, info._replace(n_gradients=count, n_densities=info.n_densities + 1)
