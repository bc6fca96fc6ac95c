r"""Trajectories that follow a learned energy, and draws that are the true posterior's.

A learned gradient that depends on the position alone moves points reversibly and without change of
volume, so it may stand in for the true one wherever the true energy has the last word. There are
two ways to give it that. *Per leaf*, every point of a trajectory is weighted by its true energy.
*At the endpoint*, whole transitions are made that are reversible for the learned density
:math:`e^{-S}`, and their outcome z' is accepted once, with probability

.. math:: \min(1, e^{-U(z') + S(z') + U(z) - S(z)}),

which takes one true energy for the draw and no gradient at all. Where the energy is an estimate,
its noise is held meanwhile, and refreshed afterwards.

Whether to trust the learned gradient somewhere may depend on where that is, and on nothing else.
A test of how large the energy error of the trajectory has been so far, the online monitoring of the
literature, is a test of its history: undone, the trajectory would switch elsewhere, or not at all,
so that it is not reversible, and its draws are biased whatever is done at the end.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.mcmc.refresh import Blocks, Refresh
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

serial = itertools.count()


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
        self._name = f"surrogate {next(serial)}"

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
        """What the potential does with a function, for one around the network."""
        name = f"{name}, {self._name}"
        return self.potential.accelerate(name, function, *examples, passing=self.passing)


def frozen(network: PotentialNetwork, example: Tensor) -> PotentialNetwork:
    """A copy of a network, of an example's type and on its device, that no training changes."""
    return copy.deepcopy(network).to(example).eval().requires_grad_(False)


class EndpointTransition:
    """Moves by transitions on a learned density, and accepts where they end; then the noise moves.

    Parameters move with the noise held, which one estimate corrects, and the noise is refreshed by
    another. Were fresh noise proposed with the parameters, and accepted with them, chains would
    stay for long where an estimate came out high; element by element it is renewed in every draw.

    Arguments:
        potential: The true one.
        surrogate: The learned density.
        inner: A transition that is reversible for it.
        refresh: The move of the noise.
        num_transitions: How many transitions of the learned density make one proposal.

    Attributes:
        observer: Called with each proposal and its noise, while a surrogate is being learned.
        inner_rate: The acceptance rate within the latest transitions, to tune them by.

    Invariant:
        The density exp(-U(z, u)) N(u; 0, I) of positions and noise, exactly, whatever the network.

    References:
        | Surrogate transitions: Monte Carlo Strategies in Scientific Computing (Liu, 2001), 9.4.3
        | Pseudo-marginal slice sampling (Murray, Graham, 2016), for the noise
        | https://arxiv.org/abs/1510.02958
    """

    def __init__(
        self,
        potential: Potential,
        surrogate: SurrogateDensity,
        inner: ParameterTransition,
        refresh: Refresh,
        *,
        num_transitions: int,
    ) -> None:
        self.potential = potential
        self.surrogate = surrogate
        self.inner = inner
        self.refresh = refresh
        self.blocks = Blocks(potential)
        self.num_transitions = num_transitions
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
        noise, share = state.noise, None
        if self.observer is not None:
            self.observer(end.position, noise)
        there = self.potential.evaluate(end.position, noise)
        error = (there.value.double() - state.evaluation.value.double()) - gain
        decision = metropolis(error, draw_level(len(noise), noise.device))
        accepted = decision.accepted
        position = select(accepted, end.position, state.position)
        evaluation = select_evaluation(accepted, there, state.evaluation)
        count = torch.ones_like(accepted, dtype=torch.long)
        if noise.shape[1]:
            noise, evaluation, share, evaluations = self.refresh(
                self.blocks,
                noise,
                evaluation,
                lambda proposed: self.potential.evaluate(position, proposed),
            )
            count = count + evaluations
        kinetic = info.energy - end.evaluation.value.double()
        info = info._replace(
            **decision._asdict(),
            energy=evaluation.value.double() + kinetic,
            n_gradients=torch.zeros_like(count),
            n_densities=count,
            refresh_rate=share,
            surrogate_accepted=accepted,
            surrogate_error=error,
        )
        return State(position, noise, state.gradient, evaluation), info
