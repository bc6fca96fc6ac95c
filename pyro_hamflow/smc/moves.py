"""Moves of a whole population, tuned on it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transitions.base import State, Tuning
from pyro_hamflow.mcmc.transitions.hmc import HMCTransition
from pyro_hamflow.mcmc.transitions.in_blocks import InBlocks
from pyro_hamflow.mcmc.transitions.pseudo_marginal import JointTransition
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.tempered import Ends, TemperedTarget

_TARGET = 0.8  # of the acceptance
_GAIN = 1.5  # of the logarithm of the step size, for each unit of acceptance
_LARGEST = 1.5  # step in whitened coordinates, where steps of 2 are unstable
_TURN = 2.0  # the time of a trajectory there, a little more than a quarter of a turn
_MOST_STEPS = 8  # of a trajectory
_JITTER = 0.3  # standard deviation of the logarithm of particles' steps
_MOST_DENSE = 300  # dimensions with a dense mass
_FEW, _EACH = 5.0, 0.2  # particles, and particles for each dimension


class PopulationMoves:
    """HMC moves of all particles, noise included, with one step size and one mass.

    The mass is the mean curvature that the scores show (their second moment), which knows nothing
    of how far modes are apart; positions' variances, which do, would make steps too long within a
    mode.

    Arguments:
        target: What is left invariant; it may change between moves.
        position: Particles to begin with, of shape ``(particles, dimension)``, by whose variances
            the first moves go.

    Attributes:
        tuning: Step size and mass, as the population shows them so far.
        num_gradients: How many gradients each particle has taken.

    Invariant:
        The target, exactly, while the tuning stays the same.
    """

    def __init__(self, target: TemperedTarget, position: Tensor) -> None:
        self.target = target
        self.num_gradients = 0
        self.count, self.rows = len(position), target.rows_at_once(len(position))
        move = JointTransition if target.noise_dimension else HMCTransition
        self.transition = InBlocks(move(target, self.rows), self.rows)
        good = position[position.isfinite().all(-1)].double()
        if target.dimension <= _MOST_DENSE:
            spread = torch.cov(good.mT).reshape(target.dimension, target.dimension)
            spread = spread + 1e-9 * spread.diagonal().mean() * torch.eye(len(spread)).to(spread)
        else:
            spread = good.var(0)
        self.tuning = Tuning(0.5, GaussianKinetic(spread.to(position)))

    def __call__(
        self, position: Tensor, noise: Tensor, ends: Ends, tuning: Tuning, num_moves: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Moves all particles so many times.

        Arguments:
            position: Where they are.
            noise: Their noise.
            ends: What lies at the path's ends there, as :meth:`ends` tells.
            tuning: Step size and mass.
            num_moves: How many times.

        Returns:
            Their positions, noise, and mean acceptance, of shape ``(particles,)``.
        """
        num_steps = max(1, min(_MOST_STEPS, round(_TURN / tuning.step_size)))
        value, gradient = self.target.between(ends)
        state, rates = State(position, noise, gradient, Evaluation(value, {}, {})), []
        for _ in range(num_moves):
            state, info = self.transition.step(state, self._jittered(tuning), num_steps)
            rates.append(info.acceptance_rate)
        self.num_gradients += num_moves * num_steps
        return state.position, state.noise, torch.stack(rates).mean(0)

    def _jittered(self, tuning: Tuning) -> Tuning:
        jitter = torch.randn(self.count, dtype=torch.float64, device=self.target.example.device)
        return tuning._replace(step_scale=(_JITTER * jitter).exp().clamp(0.5, 1.3))

    def ends(self, position: Tensor, noise: Tensor) -> Ends:
        """What lies at the path's ends at all particles, whatever the temperature."""
        self.num_gradients += 1
        parts = zip(position.split(self.rows), noise.split(self.rows), strict=True)
        ends = zip(*(self.target.ends(*some) for some in parts), strict=True)
        return Ends(*(torch.cat(part) for part in ends))

    def tune_step(self, acceptance: float) -> None:
        """Lengthens steps that are mostly accepted, and shortens others."""
        size = self.tuning.step_size * math.exp(_GAIN * (acceptance - _TARGET))
        self.tuning = self.tuning._replace(step_size=min(size, _LARGEST))

    def tune_mass(self, scores: Tensor, weights: Tensor) -> None:
        """Takes the scores' second moment for the mass, shrunk to what it was.

        Arguments:
            scores: The target's gradient at the particles.
            weights: Of the particles, adding up to one.
        """
        good = scores.isfinite().all(-1)
        scores = scores[good].double()
        weights = weights[good] / weights[good].sum()
        count = 1.0 / float(weights.square().sum())
        before = self.tuning.kinetic
        root = before.root.double()
        shrinkage = shrinkage_of(self.target.dimension)
        if before.is_dense:
            whitened = scores @ root
            moment = (whitened * weights[:, None]).mT @ whitened
            identity = torch.eye(len(moment)).to(moment)
            moment = (count * moment + shrinkage * identity) / (count + shrinkage)
            inverse = root @ torch.linalg.inv(moment) @ root.mT
            inverse = 0.5 * (inverse + inverse.mT)
        else:
            moment = (scores * root).square().mul(weights[:, None]).sum(0)
            moment = (count * moment + _FEW) / (count + _FEW)
            inverse = before.inverse_mass.double() / moment
        self.tuning = self.tuning._replace(kinetic=GaussianKinetic(inverse.to(before.inverse_mass)))


def shrinkage_of(dimension: int) -> float:
    """How many particles it takes to outweigh that there are no correlations."""
    return _FEW + _EACH * dimension
