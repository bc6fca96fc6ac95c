"""The No-U-Turn Sampler, all chains at once: on parameters, or on parameters and noise together."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import Phase, leapfrog_step, rotating_leapfrog_step
from pyro_hamflow.dynamics.kinetic import whiten
from pyro_hamflow.mcmc.transitions.base import Info, Observe, State, Tuning
from pyro_hamflow.mcmc.transitions.trajectory import (
    Energy,
    Motion,
    Pick,
    Point,
    Tree,
    begin,
    deepened,
    extend,
)
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import Program

_LARGE = 20_000
_SHALLOW = 4


class NUTSTransition:
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
        self._gradient = target.graph("gradient", num_chains)
        motion = Motion(self._move, _whiten, _energy, target.dimension)
        example = target.vectors(num_chains)[0]
        self._builder = TreeBuilder(target, motion, example, max_tree_depth, "tree", observe)

    def begin(self, position: Tensor, noise: Tensor) -> State:
        value, gradient = self._gradient(position, noise)
        return State(position, noise, gradient, Evaluation(value, {}, {}))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        start = Point(state.position.mT, torch.randn_like(state.position).mT, state.gradient.mT)
        value = state.evaluation.value
        tree = self._builder.build(start, value, state.noise, tuning, num_steps)
        position, slope, value, *_ = tree.draw
        moved = State(position.mT, state.noise, slope.mT, Evaluation(value, {}, {}))
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
        return state._replace(gradient=here.slope.mT, evaluation=evaluation)

    def _move(
        self, point: Point, noise: Tensor, root: Tensor, step: Tensor
    ) -> tuple[Point, Tensor, Tensor]:
        plain = []

        def gradient(z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = self._gradient(z, noise)
            plain.append(slope)
            return value, whiten(root, slope)

        z, r, slope = (part.mT for part in point)
        z, r, value, slope = leapfrog_step(
            gradient, z, r, slope, noise, _velocity(root), step[:, None]
        )
        return Point(z.mT, r.mT, slope.mT), value, plain[0].mT


def _velocity(root: Tensor) -> Tensor:
    """What takes whitened momenta to velocities."""
    return root if root.dim() == 1 else root.mT


def _whiten(root: Tensor, slope: Tensor) -> Tensor:
    return whiten(root, slope.mT).mT


def _energy(point: Point, value: Tensor) -> Energy:
    total = value.double() + 0.5 * point.momentum.double().square().sum(0)
    return Energy(total, total)


class JointNUTSTransition:
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
        self._gradients = target.graph("gradients", num_chains)
        self._size = target.dimension
        motion = Motion(self._move, self._whiten, self._energy, target.dimension)
        example = torch.cat(target.vectors(num_chains), -1)
        self._builder = TreeBuilder(target, motion, example, max_tree_depth, "joint tree")

    def begin(self, position: Tensor, noise: Tensor) -> State:
        _, *slopes = self._gradients(position, noise)
        evaluation = self.target.evaluate(position, noise)
        return State(position, noise, torch.cat(slopes, -1), evaluation)

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
        moved = State(position, noise, tree.draw.slope.mT, evaluation)
        return moved, self._builder.info(tree)._replace(n_densities=1)

    def _parts(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Parameters, and the noise behind them, as rows."""
        rows = columns.mT
        return rows[:, : self._size], rows[:, self._size :]

    def _move(
        self, point: Point, noise: Tensor, root: Tensor, step: Tensor
    ) -> tuple[Point, Tensor, Tensor]:
        plain = []

        def gradients(z: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            value, slope, noise_slope = self._gradients(z, u)
            plain.append(torch.cat([slope, noise_slope], -1))
            return value, whiten(root, slope), noise_slope

        (z, u), (r, p) = self._parts(point.position), self._parts(point.momentum)
        slopes = self._parts(point.slope)
        phase, value, *slopes_there = rotating_leapfrog_step(
            gradients, Phase(z, r, u, p), *slopes, _velocity(root), step[:, None]
        )
        pairs = ((phase.z, phase.u), (phase.r, phase.p), tuple(slopes_there))
        return Point(*(torch.cat(pair, -1).mT for pair in pairs)), value, plain[0].mT

    def _whiten(self, root: Tensor, slope: Tensor) -> Tensor:
        of_parameters, of_noise = self._parts(slope)
        return torch.cat([whiten(root, of_parameters), of_noise], -1).mT

    def _energy(self, point: Point, value: Tensor) -> Energy:
        squares = point.momentum.double().square()
        kinetic, spin = squares[: self._size].sum(0), squares[self._size :].sum(0)
        parameters = value.double() + 0.5 * kinetic
        norm = point.position[self._size :].double().square().sum(0)
        return Energy(parameters + 0.5 * (norm + spin), parameters)


class TreeBuilder:
    """Builds trajectories by a program that adds a point to that of each chain.

    Arguments:
        target: The target; compiles the program if asked to.
        motion: How points move.
        example: Positions of all chains, noise included if it moves.
        max_tree_depth: The most doublings of a trajectory.
        name: Of the program.
        observe: Is told of all steps.
    """

    def __init__(
        self,
        target: Target,
        motion: Motion,
        example: Tensor,
        max_tree_depth: int,
        name: str,
        observe: Observe | None = None,
    ) -> None:
        self.target = target
        self._observe = observe
        self.motion = motion
        self.max_tree_depth = max_tree_depth
        self._name = name if observe is None else f"{name}, observed"
        # Marks are read at every step: where they are large, few are made until more are needed.
        large = example.numel() * max_tree_depth > _LARGE
        depth = min(max_tree_depth, _SHALLOW) if large else max_tree_depth
        self._full = 2**depth - 1 if depth < max_tree_depth else -1
        self._most = 2**max_tree_depth - 1
        chains, rows = len(example), (depth + 1, motion.dimension)
        self._marks = example.new_zeros(*rows, chains)
        self._level = example.new_zeros(3, chains, dtype=torch.float64)

    def build(
        self, start: Point, value: Tensor, noise: Tensor, tuning: Tuning, num_steps: int
    ) -> Tree:
        """Builds a trajectory for every chain to its end, of ``num_steps`` steps at most."""
        limit = min(num_steps, self._most)
        tensors, settings = self._prepare(start, value, noise, tuning, limit)
        program = self._accelerate(tensors, settings)
        for number in itertools.count(1):
            before = tensors
            tensors, latest = self._extend(program, tensors, (*settings, self._draw_level()))
            if self._observe is not None:
                old, new = Tree.unflatten(before), Tree.unflatten(tensors)
                position, value, slope = latest
                turned = new.sign != old.sign  # a doubling goes on from either of the two ends
                self._observe(position.mT, value, slope.mT, ~old.done, turned)
            if bool(tensors[-1].all()):
                break
            if number == self._full:
                tensors = deepened(Tree.unflatten(tensors), self.max_tree_depth).flatten()
                program = self._accelerate(tensors, settings)
        return Tree.unflatten(tensors)

    def first_step(self, start: Point, value: Tensor, noise: Tensor, tuning: Tuning) -> Pick:
        """The first point that trajectories add."""
        tensors, settings = self._prepare(start, value, noise, tuning, 1)
        program = self._accelerate(tensors, settings)
        return Tree.unflatten(self._extend(program, tensors, (*settings, self._level))[0]).candidate

    def info(self, tree: Tree) -> Info:
        """What happened in the transition to a tree's draw."""
        depth = torch.log2(tree.num_points.double() + 1.0).ceil()  # a broken doubling counts too
        return Info(
            accepted=tree.draw.error != 0.0,
            acceptance_rate=tree.rate / tree.num_points,
            energy_error=tree.draw.error,
            diverging=tree.diverging,
            energy=tree.draw.energy,
            n_steps=tree.num_points,
            n_gradients=tree.num_points,
            n_densities=0,
            further={
                "tree_depth": depth.long(),
                "reached_max_treedepth": tree.limited & (tree.num_points == self._most),
            },
        )

    def _prepare(
        self, start: Point, value: Tensor, noise: Tensor, tuning: Tuning, limit: int
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A tree of one point, and what does not change while it grows."""
        root, example = tuning.kinetic.root, self.target.example
        size = tuning.step_sizes(start.position.mT)
        most = torch.full_like(example, limit, dtype=torch.long)
        tree = begin(start, value, self.motion, root, self._marks)
        return tree.flatten(), (noise, root, size, most)

    def _accelerate(self, tensors: tuple[Tensor, ...], settings: tuple[Tensor, ...]) -> Program:
        inputs = (*tensors, *settings, self._level)
        return self.target.accelerate(self._name, self._program, *inputs)

    @staticmethod
    def _extend(
        program: Program, tensors: tuple[Tensor, ...], settings: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """A tree with one point more; and position, potential and gradient there, if observed."""
        made = program(*tensors, *settings)
        return made[: len(tensors)], made[len(tensors) :]

    def _draw_level(self) -> Tensor:
        return torch.rand(self._level.shape, dtype=self._level.dtype, device=self._level.device)

    def _program(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tree, latest = extend(Tree.unflatten(inputs[:-5]), self.motion, *inputs[-5:])
        seen = () if self._observe is None else (latest.position, latest.value, latest.slope)
        return *tree.flatten(), *seen
