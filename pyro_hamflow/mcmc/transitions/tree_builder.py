"""Builds whole trajectories out of a program that adds a point to that of each chain."""

from __future__ import annotations

import itertools
from collections import deque

import torch
from torch import Tensor

from pyro_hamflow.mcmc.transitions.base import Info, Observe, Tuning
from pyro_hamflow.mcmc.transitions.trajectory import extend
from pyro_hamflow.mcmc.transitions.tree import (
    Motion,
    Pick,
    Point,
    Tree,
    deepened,
    tree_of_one_point,
)
from pyro_hamflow.model.target import Target
from pyro_hamflow.programs.capture import Program

_LARGE = 20_000  # numbers in the marks of all chains; not tuned
_SHALLOW = 4  # doublings that marks are made for at first, where they are large
_MOST_PLACES = 256  # where trajectories diverged, that are kept


class TreeBuilder:
    """Builds trajectories by a program that adds a point to that of each chain.

    Arguments:
        target: The target; compiles the program if asked to.
        motion: How points move.
        example: Positions of all chains, noise included if it moves.
        max_tree_depth: The most doublings of a trajectory.
        name: Of the program.
        observe: Is told of all steps.

    Attributes:
        places: Where the latest trajectories were before they diverged, noise included if it moves.
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
        self.places: deque[Tensor] = deque(maxlen=_MOST_PLACES)
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
        self._uniform = example.new_zeros(3, chains, dtype=torch.float64)

    def build(
        self, start: Point, value: Tensor, noise: Tensor, tuning: Tuning, num_steps: int
    ) -> Tree:
        """Builds a trajectory for every chain to its end, of ``num_steps`` steps at most."""
        limit = min(num_steps, self._most)
        tensors, settings = self._prepare(start, value, noise, tuning, limit)
        program = self._accelerate(tensors, settings)
        for number in itertools.count(1):
            before = tensors
            tensors, latest = self._extend(program, tensors, (*settings, self._draw_uniform()))
            if self._observe is not None:
                old, new = Tree.unflatten(before), Tree.unflatten(tensors)
                position, value, gradient = latest
                turned = new.sign != old.sign  # a doubling goes on from either of the two ends
                self._observe(position.mT, value, gradient.mT, ~old.done, turned)
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
        return Tree.unflatten(
            self._extend(program, tensors, (*settings, self._uniform))[0]
        ).candidate

    def info(self, tree: Tree) -> Info:
        """The statistics of a transition to the draw of a finished tree."""
        if bool(tree.diverging.any()):
            self.places += tree.here.position.mT[tree.diverging]
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
        """A tree of one point as a tuple; and noise, root, step sizes and the most steps."""
        root, example = tuning.kinetic.root, self.target.example
        size = tuning.step_sizes(start.position.mT)
        most = torch.full_like(example, limit, dtype=torch.long)
        tree = tree_of_one_point(start, value, self.motion, root, self._marks)
        return tree.flatten(), (noise, root, size, most)

    def _accelerate(self, tensors: tuple[Tensor, ...], settings: tuple[Tensor, ...]) -> Program:
        inputs = (*tensors, *settings, self._uniform)
        return self.target.accelerate(self._name, self._program, *inputs)

    @staticmethod
    def _extend(
        program: Program, tensors: tuple[Tensor, ...], settings: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Adds a point.

        Returns:
            The tree as a tuple; and position, potential and gradient at the new point, if steps
            are observed.
        """
        made = program(*tensors, *settings)
        return made[: len(tensors)], made[len(tensors) :]

    def _draw_uniform(self) -> Tensor:
        return torch.rand(
            self._uniform.shape, dtype=self._uniform.dtype, device=self._uniform.device
        )

    def _program(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        tree, latest = extend(Tree.unflatten(inputs[:-5]), self.motion, *inputs[-5:])
        seen = () if self._observe is None else (latest.position, latest.value, latest.gradient)
        return *tree.flatten(), *seen
