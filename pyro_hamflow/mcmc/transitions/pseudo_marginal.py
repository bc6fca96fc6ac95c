r"""Pseudo-marginal Hamiltonian Monte Carlo, in two exact ways.

The target is the extended density :math:`p(\theta)\, \hat p(y \mid \theta, u)\, N(u; 0, I)`, whose
marginal in :math:`\theta` is the exact posterior because the estimate is unbiased. *Joint* moves
follow the gradient of its logarithm in parameters and noise together. *Conditional* moves follow it
in the parameters, the noise held, and then refresh the noise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import PhasePoint, drift, kick_and_drift
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    ParameterTransition,
    State,
    Tuning,
    draw_uniform,
    metropolis,
    select_state,
)
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, Refresh
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import Program
from pyro_hamflow.programs.made import Made


class JointTransition(Made):
    """Moves parameters and noise together, by the splitting integrator.

    Arguments:
        target: The target.
        num_chains: How many chains.

    Invariant:
        The extended density of parameters and noise, exactly, for every number of particles.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021), section 3
        | https://arxiv.org/abs/1607.02516
    """

    def __init__(self, target: Target, num_chains: int) -> None:
        self.target = target
        self.num_chains = num_chains
        self._value_and_gradients = target.graph("gradients", num_chains)

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.zeros_like(position), evaluation)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        kinetic = tuning.kinetic
        mass = kinetic.inverse_mass
        size = tuning.step_sizes(state.position)[:, None]
        start = PhasePoint(
            state.position,
            kinetic.sample(self.num_chains),
            state.noise,
            torch.randn_like(state.noise),
        )
        phase = self.trajectory(start, mass, size, num_steps)
        evaluation = self.target.evaluate(phase.z, phase.u)
        before = state.evaluation.value.double()
        kinetic_before = kinetic.energy(start.r).double()
        kinetic_after = kinetic.energy(phase.r).double()
        error = (evaluation.value.double() - before) + (kinetic_after - kinetic_before)
        error = error + _half_square_gain(phase.u, start.u) + _half_square_gain(phase.p, start.p)
        decision = metropolis(error, draw_uniform(self.num_chains, error.device))
        accepted = decision.accepted
        proposed = State(phase.z, phase.u, state.gradient, evaluation)
        moved = select_state(accepted, proposed, state)
        energy = moved.evaluation.value.double() + torch.where(
            accepted, kinetic_after, kinetic_before
        )
        info = Info(
            *decision, energy=energy, n_steps=num_steps, n_gradients=num_steps, n_densities=1
        )
        return moved, info

    def trajectory(
        self, start: PhasePoint, inverse_mass: Tensor, step_size: Tensor, num_steps: int
    ) -> PhasePoint:
        r"""Steps of the splitting integrator.

        For the extended Hamiltonian :math:`H = U(z, u) + \tfrac12 r^\top M^{-1} r + \tfrac12
        (\lVert u \rVert^2 + \lVert p \rVert^2)`, each step is half a drift of the position with a
        rotation of the noise, a full kick of both momenta, and the same half again. Halves that
        meet are joined, so L steps take L gradients.

        Arguments:
            start: Where to start.
            inverse_mass: As in :class:`~pyro_hamflow.dynamics.kinetic.GaussianKinetic`.
            step_size: In radians of the noise's rotation: a scalar, or one for each chain, of shape
                ``(chains, 1)``.
            num_steps: L.

        Invariant:
            Volume; turning both momenta round and integrating again leads back to the start. The
            energy error is of order ``step_size ** 2``, and vanishes where the potential is
            constant.
        """
        advance = self._advance(inverse_mass)
        phase = drift(start, inverse_mass, 0.5 * step_size)
        for step in range(num_steps):
            time = step_size if step < num_steps - 1 else 0.5 * step_size
            phase = PhasePoint(*advance(*phase, inverse_mass, step_size, time))
        return phase

    def _advance(self, inverse_mass: Tensor) -> Program:
        """A kick and the drift after it as one program."""

        def advance(
            z: Tensor, r: Tensor, u: Tensor, p: Tensor, mass: Tensor, size: Tensor, time: Tensor
        ) -> tuple[Tensor, ...]:
            phase = PhasePoint(z, r, u, p)
            return tuple(kick_and_drift(self._value_and_gradients, phase, mass, size, time))

        position, noise = self.target.vectors(self.num_chains)
        size = position.new_ones(len(position), 1)
        examples = (position, position, noise, noise, inverse_mass, size, size)
        return self.target.accelerate("splitting", advance, *examples)


def _half_square_gain(new: Tensor, old: Tensor) -> Tensor:
    """Half the gain in the sum of squares, from differences, in float64."""
    return 0.5 * ((new - old) * (new + old)).double().sum(-1)


class ConditionalTransition:
    """Moves parameters with the noise held, then refreshes the noise.

    Arguments:
        inner: The move of the parameters.
        refresh: The move of the noise.
        blocks: Which parts of the noise are accepted together.

    Invariant:
        The extended density of parameters and noise, exactly, for every number of particles: both
        halves leave it so.

    References:
        | Pseudo-marginal slice sampling (Murray, Graham, 2016)
        | https://arxiv.org/abs/1510.02958
    """

    def __init__(self, inner: ParameterTransition, refresh: Refresh, blocks: Blocks) -> None:
        self.target = inner.target
        self.inner = inner
        self.refresh = refresh
        self.blocks = blocks

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        state = self.inner.state_at(position, noise)
        return state._replace(evaluation=self.target.evaluate(position, noise))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        moved, info = self.inner.step(state, tuning, num_steps)
        position = moved.position
        here = self.target.evaluate(position, moved.noise)
        noise, evaluation, share, count = self.refresh(
            self.blocks,
            moved.noise,
            here,
            lambda proposed: self.target.evaluate(position, proposed),
        )
        changed = State(position, noise, moved.gradient, evaluation)
        fresh = self.inner.refreshed(changed, tuning)
        info = info._replace(
            energy=info.energy + (fresh.evaluation.value - here.value).double(),
            n_gradients=info.n_gradients + int(fresh is not changed),
            n_densities=info.n_densities + 1 + count,
        )
        return fresh, info.adding(refresh_rate=share)
