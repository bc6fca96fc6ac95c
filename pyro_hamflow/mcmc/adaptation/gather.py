"""The phase of a run along a learned energy that gathers true gradients to learn from."""

from __future__ import annotations

from typing import Any

import torch

from pyro_hamflow.mcmc.adaptation.base import Phase
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.learning import Learning
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.adaptation.verdict import Trial
from pyro_hamflow.mcmc.transitions.base import Info, State, padded
from pyro_hamflow.surrogates.gradient_log import LeapfrogSettings
from pyro_hamflow.surrogates.learner import FEWEST_GATHER


class Gather(Tune):
    """Follows true gradients, and keeps what they find, until a network can be fitted to it.

    Arguments are those of :class:`~pyro_hamflow.mcmc.adaptation.tune.Tune`, and ``learning``.
    """

    def __init__(self, *arguments: Any, learning: Learning) -> None:
        super().__init__(*arguments)
        self.learning = learning

    @property
    def is_opening(self) -> bool:
        """Whether trajectories are kept short: at first alone, for later ones teach."""
        return super().is_opening and self.learning.run.iteration <= FEWEST_GATHER

    def advance(self, state: State) -> tuple[State, Info]:
        learning, run, learner = self.learning, self.learning.run, self.learning.learner
        run.iteration += 1
        sizes = self.tuning.step_sizes(state.position)
        learner.log.motion = LeapfrogSettings(sizes, self.tuning.kinetic.inverse_mass)
        state, info = super().advance(state)
        info = padded(info)
        learning.trial.note(info, 0.0)
        run.report.n_gradients += int(torch.as_tensor(info.n_gradients).sum())
        if learner.forget_start(run.iteration):
            learning.trial = Trial()
        return state, info

    def restart(self, state: State) -> None:
        """Begins the search for the step size anew; its trial steps teach nothing."""
        log = self.learning.learner.log
        known = len(log.entries)
        super().restart(state)
        log.entries[known:] = [e._replace(wanted=e.wanted & False) for e in log.entries[known:]]

    def _refitted(self, estimator: EstimatorTuning, state: State) -> State:
        changed = estimator.retuned(state)
        if changed is None:
            return state
        potential, position, noise = changed
        self.transition = self.learning.gather_anew(potential)
        return self.transition.state_at(position, noise)

    def successor(self, state: State) -> tuple[Phase, State] | None:
        learning, run = self.learning, self.learning.run
        if not learning.learner.knows_enough(run.iteration, run.choices.num_proposals):
            return None
        reason = learning.too_costly()
        if reason is not None:
            return learning.give_up(state, self.tuning, reason)
        return learning.learn(state, self.tuning)
