"""The phase that tunes step size and mass, and the estimator if there is one, then draws."""

from __future__ import annotations

import torch

from pyro_hamflow.mcmc.adaptation.base import Moves, Phase, RunPlan, Sample
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.step_and_mass import StepAndMass
from pyro_hamflow.mcmc.adaptation.watch import Standstill
from pyro_hamflow.mcmc.adaptation.window import Findings, WarmUp
from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning
from pyro_hamflow.mcmc.transitions.trajectories import Trajectories

_OPENING_STEPS = 20  # of a trajectory at most, while chains are on their way to the typical set


class Tune:
    """Finds step size and mass in windows; draws with them when it is done.

    Arguments:
        transition: The move.
        trajectories: How its trajectories end.
        step_and_mass: What is tuned, and how.
        warmup: What is found, window by window.
        plan: What the run is to be.
        estimator: What is tuned of a likelihood estimate, if there is one.

    Attributes:
        is_local: Whether chains are in one mode, as far as is known, so that an estimator may be
            fitted at their middle.
    """

    is_local = True

    def __init__(
        self,
        transition: Transition,
        trajectories: Trajectories,
        step_and_mass: StepAndMass,
        warmup: WarmUp,
        plan: RunPlan,
        estimator: EstimatorTuning | None = None,
    ) -> None:
        self.transition = transition
        self.trajectories = trajectories
        self.step_and_mass = step_and_mass
        self.warmup = warmup
        self.plan = plan
        self.estimator = estimator
        self._standstill = Standstill()

    @property
    def tuning(self) -> Tuning:
        return self.warmup.tuning

    @property
    def adapting(self) -> bool:
        return not self.warmup.finished

    @property
    def remaining(self) -> int:
        return self.warmup.remaining

    @property
    def is_opening(self) -> bool:
        """Whether trajectories are kept short, for chains are on their way to the typical set."""
        return self.warmup.opening

    def advance(self, state: State) -> tuple[State, Info]:
        """Moves all chains once and takes in the outcome, which may end a window or the warm-up."""
        warmup = self.warmup
        num_steps = self.trajectories.draw_num_steps(warmup.tuning.step_size)
        if self.is_opening:
            num_steps = min(num_steps, _OPENING_STEPS)
        num_steps = self._standstill.shortened(num_steps)
        state, info = self.transition.step(state, warmup.tuning, num_steps)
        self._standstill.update(info, num_steps, warmup.tuning.step_size)
        warmup.may_go_on &= not self._standstill.found
        changed = warmup.update(state, info)
        return state if warmup.waits else self._concluded(state, changed=changed), info

    def share(self, state: State) -> Findings | None:
        """What is to be joined with what others have found; none if it does not wait for them."""
        return self.warmup.found(len(state.position)) if self.warmup.waits else None

    def take_in(self, found: Findings, state: State) -> State:
        """Goes on with what all have found together."""
        return self._concluded(state, changed=self.warmup.take_in(found))

    def _concluded(self, state: State, *, changed: bool) -> State:
        """What follows from an iteration, which may end a window or the warm-up."""
        warmup = self.warmup
        if changed:
            self._standstill.restart()
        if changed and not warmup.finished:
            if self.estimator is not None:
                state = self._refitted(self.estimator, state)
            if self.step_and_mass.adapt_step_size:
                self.restart(state)
        if warmup.finished:
            self._tell(state)
        if self.estimator is not None:
            self.estimator.note(state)
            if warmup.finished:
                self.estimator.examine(state)
        return state

    def _refitted(self, estimator: EstimatorTuning, state: State) -> State:
        """Fits the estimator anew, if that is worth it; returns the state on the new target."""
        changed = estimator.retuned(state, may_move=self.is_local)
        if changed is None:
            return state
        potential, position, noise = changed
        self.transition = estimator.transition(potential, position)
        return self.transition.state_at(position, noise)

    def restart(self, state: State) -> None:
        """Begins the search for the step size anew, from a reasonable one."""
        size = self.step_and_mass.reasonable_step_size(self.transition, state, self.warmup.tuning)
        self.warmup.restart(size)

    def _tell(self, state: State) -> None:
        """Says if warm-up got nowhere, took longer than was planned, or has not converged."""
        warmup = self.warmup
        if self._standstill.found:
            highest = -float(state.evaluation.value.min())
            is_wide = state.position.dtype == torch.float64
            coarse = f" Or {state.position.dtype} rounds it away: try torch.float64."
            self.plan.say(
                "in warm-up most trajectories took all the steps that they may and led nowhere, so "
                f"that later ones were cut shorter; the step size is {warmup.tuning.step_size:.1e} "
                f"where the log density is {highest:.4g}. The density may have no bound, as where "
                "a scale goes to zero for data that are fitted exactly: look at priors of scales."
                + ("" if is_wide else coarse),
                first=True,
            )
        count = self.plan.before + warmup.warmup_steps
        took = f"warm-up {'went on to' if warmup.has_gone_on else 'took'} {count} iterations"
        if warmup.doubts:
            limit = ", its limit," if warmup.may_go_on else ""
            self.plan.say(
                f"{took}{limit} and has not converged: in its last window "
                f"{' and '.join(warmup.doubts)}."
            )
        elif warmup.has_gone_on:
            self.plan.say(f"{took}, after which it had converged.")

    def successor(self, state: State) -> tuple[Phase, State] | None:
        return None if self.adapting else (self._draw(), state)

    def final_transition(self) -> Transition:
        """The move that draws are made by."""
        return self.transition

    def _draw(self) -> Sample:
        transition, tuning = self.final_transition(), self.tuning
        return Sample(transition, Moves(transition, tuning, self.trajectories), tuning)
