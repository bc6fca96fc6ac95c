"""The No-U-Turn Sampler, all chains at once: on parameters, or on parameters and noise together."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import PhasePoint, leapfrog_step, rotating_leapfrog_step
from pyro_hamflow.dynamics.kinetic import times
from pyro_hamflow.mcmc.transitions.base import Info, Observe, State, Tuning
from pyro_hamflow.mcmc.transitions.tree import Energy, Motion, Point
from pyro_hamflow.mcmc.transitions.tree_builder import TreeBuilder
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.made import Made


class NUTSTransition(Made):
    """Moves parameters along trajectories that end at a U-turn, the noise of an estimate held.

    Points of a trajectory are picked by their weights, later doublings first; a U-turn is judged by
    the sum of the momenta, for every balanced subtree, and across the subtrees that meet.

    Arguments:
        target: The target.
        num_chains: How many chains.
        max_tree_depth: The most doublings of a trajectory.
        observe: Is told of all steps.

    Invariant:
        The density exp(-U(z, u)) of the positions at their noise, exactly.

    References:
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
        | A conceptual introduction to Hamiltonian Monte Carlo (Betancourt, 2017), appendix A
        | https://arxiv.org/abs/1701.02434
    """

    def __init__(
        self,
        target: Target,
        num_chains: int,
        max_tree_depth: int,
        observe: Observe | None = None,
    ) -> None:
        self.target = target
        self._value_and_gradient = target.graph("gradient", num_chains)
        motion = Motion(self._move, _whiten, _energy, target.dimension)
        example = target.vectors(num_chains)[0]
        self._builder = TreeBuilder(target, motion, example, max_tree_depth, "tree", observe)

    @property
    def places(self) -> Sequence[Tensor]:
        """Where the latest trajectories were before they diverged, in the target's coordinates."""
        return self._builder.places

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self._value_and_gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        start = Point(state.position.mT, torch.randn_like(state.position).mT, state.gradient.mT)
        value = state.evaluation.value
        tree = self._builder.build(start, value, state.noise, tuning, num_steps)
        position, gradient, value, *_ = tree.draw
        moved = State(position.mT, state.noise, gradient.mT, Evaluation(value, {}, {}))
        return moved, self._builder.info(tree)

    def refreshed(self, state: State, tuning: Tuning) -> State:
        """The state with potential and gradient computed anew, after its noise has changed.

        The first step of a trajectory, of size zero, does it, so that one program serves for all
        gradients.
        """
        still = torch.zeros_like(state.position.mT)
        start, value = Point(state.position.mT, still, still), state.evaluation.value
        tuning = tuning._replace(step_size=0.0)
        here = self._builder.first_step(start, value, state.noise, tuning)
        evaluation = state.evaluation._replace(value=here.value)
        return state._replace(gradient=here.gradient.mT, evaluation=evaluation)

    def _move(
        self, point: Point, noise: Tensor, root: Tensor, step: Tensor
    ) -> tuple[Point, Tensor, Tensor]:
        plain = []

        def whitened(z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = self._value_and_gradient(z, noise)
            plain.append(gradient)
            return value, times(gradient, root)

        z, r, gradient = (part.mT for part in point)
        z, r, value, gradient = leapfrog_step(
            whitened, z, r, gradient, noise, _transposed(root), step[:, None]
        )
        return Point(z.mT, r.mT, gradient.mT), value, plain[0].mT


def _transposed(root: Tensor) -> Tensor:
    """What whitened momenta are multiplied by, to move positions in plain coordinates."""
    return root if root.dim() == 1 else root.mT


def _whiten(root: Tensor, gradient: Tensor) -> Tensor:
    return times(gradient.mT, root).mT


def _energy(point: Point, value: Tensor) -> Energy:
    total = value.double() + 0.5 * point.momentum.double().square().sum(0)
    return Energy(total, total)


class JointNUTSTransition(Made):
    """Moves parameters and noise together, until the parameters make a U-turn.

    The noise turns about the origin at unit speed whatever the parameters do, so it has no say in
    where a trajectory ends; but beyond half a turn it would come back, and no trajectory goes
    further.

    Arguments:
        target: The target.
        num_chains: How many chains.
        max_tree_depth: The most doublings of a trajectory.

    Invariant:
        The extended density of parameters and noise, exactly, for every number of particles.

    References:
        | Pseudo-Marginal Hamiltonian Monte Carlo (Alenlöv et al., 2021)
        | https://arxiv.org/abs/1607.02516
        | The No-U-Turn Sampler (Hoffman, Gelman, 2014)
        | https://arxiv.org/abs/1111.4246
    """

    def __init__(self, target: Target, num_chains: int, max_tree_depth: int) -> None:
        self.target = target
        self._value_and_gradients = target.graph("gradients", num_chains)
        self._size = target.dimension
        motion = Motion(self._move, self._whiten, self._energy, target.dimension)
        example = torch.cat(target.vectors(num_chains), -1)
        self._builder = TreeBuilder(target, motion, example, max_tree_depth, "joint tree")

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        _, *gradients = self._value_and_gradients(position, noise)
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.cat(gradients, -1), evaluation)

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        parts = (state.position, state.noise)
        start = Point(
            torch.cat(parts, -1).mT,
            torch.cat([torch.randn_like(part) for part in parts], -1).mT,
            state.gradient.mT,
        )
        half_turn = int(math.pi / tuning.step_size)
        limit = max(1, min(num_steps, half_turn))
        value = state.evaluation.value
        tree = self._builder.build(start, value, state.noise[:, :0], tuning, limit)
        position, noise = self._parts(tree.draw.position)
        evaluation = self.target.evaluate(position, noise)
        moved = State(position, noise, tree.draw.gradient.mT, evaluation)
        return moved, self._builder.info(tree)._replace(n_densities=1)

    def _parts(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters, and the noise behind them, as rows."""
        rows = columns.mT
        return rows[:, : self._size], rows[:, self._size :]

    def _move(
        self, point: Point, noise: Tensor, root: Tensor, step: Tensor
    ) -> tuple[Point, Tensor, Tensor]:
        plain = []

        def whitened(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, gradient, noise_gradient = self._value_and_gradients(z, u)
            plain.append(torch.cat([gradient, noise_gradient], -1))
            return value, times(gradient, root), noise_gradient

        (z, u), (r, p) = self._parts(point.position), self._parts(point.momentum)
        gradients = self._parts(point.gradient)
        phase, value, *gradients_there = rotating_leapfrog_step(
            whitened, PhasePoint(z, r, u, p), *gradients, _transposed(root), step[:, None]
        )
        pairs = ((phase.z, phase.u), (phase.r, phase.p), tuple(gradients_there))
        return Point(*(torch.cat(pair, -1).mT for pair in pairs)), value, plain[0].mT

    def _whiten(self, root: Tensor, gradient: Tensor) -> Tensor:
        of_parameters, of_noise = self._parts(gradient)
        return torch.cat([times(of_parameters, root), of_noise], -1).mT

    def _energy(self, point: Point, value: Tensor) -> Energy:
        squares = point.momentum.double().square()
        kinetic, spin = squares[: self._size].sum(0), squares[self._size :].sum(0)
        parameters = value.double() + 0.5 * kinetic
        norm = point.position[self._size :].double().square().sum(0)
        return Energy(parameters + 0.5 * (norm + spin), parameters)
