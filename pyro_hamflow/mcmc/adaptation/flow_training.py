"""A flow for jumps, built or trained on where walkers have been, in rounds while that helps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor

from pyro_hamflow.flows.fit import TrainableGuide
from pyro_hamflow.flows.losses import Objective
from pyro_hamflow.flows.mixture_flow import DefendedFlow
from pyro_hamflow.flows.modes import Mode
from pyro_hamflow.flows.population import flow_for, train_flow
from pyro_hamflow.mcmc.adaptation.walkers import Visited, Walkers
from pyro_hamflow.model.guides import DensityGuide, log_ratio_at
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.networks.training import BATCH, CHECK_EVERY, train

_DRAWS = 4000  # that a flow is trained on
_ROWS = 1000  # gradients at once
_MOVES = 4  # local moves between two jumps of a round
_ROUNDS = 6  # of moves and training, at most
_STEPS = 400  # of one training
_LEARNING_RATE = 5e-3  # that of `fit_guide`
_REVERSE = 0.1  # how much of the reverse divergence is added where a user's guide is trained
_RISE = 0.01  # of the acceptance, for which another round is made
_HIGH = 0.8  # of the acceptance that can be had, which more training would hardly raise

Learner = TypeVar("Learner", bound=TrainableGuide)


class FlowTraining:
    """Trains what makes jumps on where walkers have been.

    Arguments:
        potential: The target.
        walkers: Draw about from it.
        modes: Those that are known.
    """

    def __init__(self, potential: Potential, walkers: Walkers, modes: Sequence[Mode] = ()) -> None:
        self.potential = potential
        self.walkers = walkers
        self.modes = modes
        self.ceiling = walkers.ceiling()

    def built(self) -> DefendedFlow:
        """A flow of its own: a mixture of Gaussians, bent by layers if it will not do alone.

        It will where most of its jumps are accepted that an estimate's noise does not forbid, or
        where a chain gets away often enough by as many proposals as may be made for a jump: these
        cost no more than a local move, and layers long training.
        """
        visited = self.walkers.visited(_DRAWS)
        gradient = self._gradient(visited)
        mixture = flow_for(
            self.potential, visited.position, gradient, num_layers=0, modes=self.modes
        )
        rate = self.walkers.jump(mixture)
        if rate > _HIGH * self.ceiling or self.walkers.jumps(mixture).suffices:
            return mixture
        flow = flow_for(self.potential, visited.position, gradient, modes=self.modes)
        return flow if self._train_in_rounds(flow, self._train_built) > rate else mixture

    def given(self, guide: TrainableGuide) -> None:
        """Trains a user's flow, in place."""
        self._train_given(guide, self.walkers.visited(_DRAWS))
        self._train_in_rounds(guide, self._train_given)

    def _train_in_rounds(self, guide: Learner, learn: Callable[[Learner, Visited], None]) -> float:
        """Jumps, moves and trainings while more jumps are accepted.

        Returns:
            The acceptance of the best state, in which it is left.
        """
        best, kept, waited = -1.0, copy.deepcopy(guide.state_dict()), 0
        for number in range(_ROUNDS):
            rate = self.walkers.jump(guide)
            waited = 0 if rate > best + _RISE else waited + 1
            if rate > best:
                best, kept = rate, copy.deepcopy(guide.state_dict())
            if rate > _HIGH * self.ceiling or waited == 2 or number == _ROUNDS - 1:
                break
            self.walkers.move(_MOVES)
            learn(guide, self.walkers.visited(_DRAWS))
        guide.load_state_dict(kept)
        return best

    def _train_built(self, flow: DefendedFlow, visited: Visited) -> None:
        """Trains by draws and the gradients there."""
        train_flow(flow.flow, visited.position, self._gradient(visited))

    def _train_given(self, guide: TrainableGuide, visited: Visited) -> None:
        """Trains by draws, with a share of the reverse divergence."""
        draws = visited.position
        objective = Objective(guide, self.potential, BATCH)

        def loss(progress: float) -> Tensor:
            picked = draws[torch.randint(len(draws), (BATCH,), device=draws.device)]
            return objective.reverse() * _REVERSE - log_ratio_at(guide, picked).mean()

        train(
            guide,
            loss,
            measure=lambda progress, mean: mean,
            num_steps=_STEPS,
            learning_rate=_LEARNING_RATE,
            check_every=CHECK_EVERY,
            patience=_STEPS,
        )

    def _gradient(self, visited: Visited) -> Tensor:
        """The potential's gradient wherever walkers have been."""
        parts = zip(visited.position.split(_ROWS), visited.noise.split(_ROWS), strict=True)
        return torch.cat([self.potential.gradients(*part)[1] for part in parts])


def can_learn(flow: DensityGuide) -> bool:
    """Whether a flow has the methods of a torch module, and parameters to train."""
    methods = ("parameters", "state_dict", "load_state_dict")
    if not all(callable(getattr(flow, name, None)) for name in methods):
        return False
    return any(part.requires_grad for part in cast(TrainableGuide, flow).parameters())
