"""Moves of many chains, one block of them after the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning


class InBlocks:
    """Makes a move of some chains for a multiple of them.

    What a block makes stays in a cache where that of all chains would not, and no chain waits for
    longer trajectories than those of its own block.

    Arguments:
        transition: The move of one block.
        rows: How many chains a block has.

    Invariant:
        That of the move.
    """

    def __init__(self, transition: Transition, rows: int) -> None:
        self.target = transition.target
        self.transition = transition
        self.rows = rows

    def state_at(self, position: Tensor, noise: Tensor) -> State:
        pairs = zip(position.split(self.rows), noise.split(self.rows), strict=True)
        return _joined(*(self.transition.state_at(*pair) for pair in pairs))

    def step(self, state: State, tuning: Tuning, num_steps: int) -> tuple[State, Info]:
        moved = []
        for start in range(0, len(state.position), self.rows):
            block = slice(start, start + self.rows)
            scale = None if tuning.step_scale is None else tuning.step_scale[block]
            own: State = tree_map(lambda part, block=block: part[block], state)
            moved.append(self.transition.step(own, tuning._replace(step_scale=scale), num_steps))
        states, infos = zip(*moved, strict=True)
        return _joined(*states), _joined(*infos)


def _joined(*blocks: Any) -> Any:
    """Tensors of all blocks, one behind the other; what is no tensor is the same in each."""
    return tree_map(
        lambda *parts: torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0], *blocks
    )
