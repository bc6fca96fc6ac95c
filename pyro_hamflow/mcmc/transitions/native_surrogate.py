"""A learned energy followed in machine code, and true energies looked at in it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.mcmc.transitions.base import Info, State, Tuning
from pyro_hamflow.mcmc.transitions.native import NativeTransition
from pyro_hamflow.mcmc.transitions.native_estimate import parts_of, split_rows
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.recovery import Evaluation
from pyro_hamflow.programs.engines.buffers import NotSupported
from pyro_hamflow.programs.engines.native import native_program
from pyro_hamflow.programs.made import Made
from pyro_hamflow.surrogates.targets import SurrogateDensity


class NativeSurrogateTransition(NativeTransition):
    """Moves along a learned energy in machine code, each row for itself.

    The network's weights are data of the machine code: one library serves all networks of the same
    sizes, whatever the model and however often they are fitted.

    Arguments:
        density: The learned density.
        max_tree_depth: The most doublings of a trajectory; none where trajectories have lengths.
        stream: The random numbers, which several transitions may share.

    Invariant:
        The learned density, exactly.
    """

    @staticmethod
    def graph_of(target: Potential | SurrogateDensity, kind: str) -> GraphModule | None:
        assert isinstance(target, SurrogateDensity)
        return target.chain_graph()

    def several(
        self, state: State, tuning: Tuning, num_steps: int, count: int
    ) -> tuple[State, Info, Tensor]:
        """So many transitions, one after the other; what happened in the last; steps of all."""
        moved, made = self.draw(state, tuning, [num_steps] * count)
        return moved, self.info(made.at(-1)), made.n_steps.sum(1)


class NativeEnergy(Made):
    """True energies in machine code, with the local sites that belong to them.

    Arguments:
        target: The true target.

    Raises:
        NotSupported: If there is no machine code for it.
    """

    def __init__(self, target: Potential) -> None:
        graph = target.programs.base("gradient")
        if graph is None:
            raise NotSupported("a model that is not captured")
        self._parts = parts_of(target) if target.recovery.estimates else None
        self._choices = target.recovery.num_choices
        looks = None if self._parts is None else self._parts.looks
        examples = [part[0] for part in target.vectors(1)]
        self._program = native_program(graph, examples, looks, gradient=False)

    def evaluate(self, position: Tensor, noise: Tensor) -> Evaluation:
        """As a target's, at the same random numbers."""
        uniform = torch.rand(len(position), self._choices, dtype=position.dtype)
        if self._parts is None:
            return Evaluation(self._program.gradient(position, noise)[0], {}, {})
        place = self._program.look(position, noise, uniform)
        factors = split_rows(place.likelihoods, self._parts.factors)
        return Evaluation(place.value, factors, split_rows(place.local, self._parts.local))
