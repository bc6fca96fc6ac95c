"""What is tuned of a likelihood estimate: how its noise moves, and its sites and particles."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.mending import fewer_particles, mend_proposal, more_particles
from pyro_hamflow.marginal.model_target import ModelTarget
from pyro_hamflow.marginal.preparation import FAR
from pyro_hamflow.marginal.refit import refit_at
from pyro_hamflow.marginal.scrutiny import look, misses
from pyro_hamflow.marginal.settle import wanted_variance
from pyro_hamflow.marginal.tails import NARROW, tail, told_of_tails
from pyro_hamflow.mcmc.adaptation.base import RunPlan
from pyro_hamflow.mcmc.adaptation.engine import Engine
from pyro_hamflow.mcmc.adaptation.spread_of_estimates import places_beyond, variance_at
from pyro_hamflow.mcmc.transitions.base import State, Transition
from pyro_hamflow.mcmc.transitions.native_estimate import looks_of
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh, Refresh
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.mcmc.transitions.trajectories import Trajectories
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from pyro_hamflow.process import random_state_kept

# Where joint moves overtake conditional ones, by effective draws per gradient: measured in
# benchmarks/methods.py for noise that is accepted as a whole, and element by element.
_LARGEST_VARIANCE, _LARGEST_FACTORISED_VARIANCE = 3.0, 20.0
# The same of one path, whose noise moves with the parameters at little cost; benchmarks/paths.py.
# Effective draws per second, conditional and joint: 129 and 87 at .2 (stochastic volatility, 2,000
# times, 4 particles), 395 and 511 at .3 (500, 1 particle), 91 and 148 at 1 (2,000, 1).
_LARGEST_PATH_VARIANCE = 0.25
_SLOW_VARIANCE = 10.0  # beyond which more particles are advised; nothing else hangs on it
_NOISY_VARIANCE = 100.0  # beyond which chains of any method stay where they are for long
# Where each element's noise is refreshed on its own, parameters move well at more: on a logistic
# model of 500 elements, 4 particles (variance .05 to 2.6 at draws) made 5.4 to 7.6 effective draws
# per second with four seeds, 16 made 2.0 and 3.5.
_WANTED_FACTORISED_VARIANCE = 4.0
_LAVISH_VARIANCE = 0.25  # below which half the particles would do
_WORSE = 1.5  # times as much as when a fit for places beyond was not worth it: it is tried again
_LOOKS = 4  # draws of warm-up, of a chain each, and places beyond, that are looked at
_METHODS = ("auto", "joint", "conditional")


class EstimatorTuning:
    """How a kernel moves the noise of an estimate, and what warm-up tunes of the estimate.

    Arguments:
        method: ``"joint"`` moves parameters and noise together; ``"conditional"`` moves parameters
            with the noise held, and then refreshes the noise; ``"auto"`` chooses by the variance
            of the estimate, and says so.
        refresh: The move of the noise under the conditional method; fresh independent noise for
            every element if not given.
        trajectories: How trajectories end.
        required: Whether models without noise are refused; else their parameters alone are moved.

    Attributes:
        chosen_method: The method that moves are made by.
        variance: That of the log estimate, where it was looked at last.
        max_pareto_k: The shape of the weights' tail, the worst of some draws at the end of warm-up.

    Raises:
        ValueError: If the method is unknown.
    """

    def __init__(
        self,
        method: str,
        refresh: Refresh | None,
        trajectories: Trajectories,
        *,
        required: bool = True,
    ) -> None:
        if method not in _METHODS:
            raise ValueError(f"`method` is {method!r}: expected one of {_METHODS}")
        self.method = method
        self.refresh = refresh or CorrelatedRefresh()
        self.trajectories = trajectories
        self.required = required
        self.chosen_method = method
        self.variance = math.nan
        self.max_pareto_k = math.nan
        self._window: list[Tensor] = []
        self._remark: str | None = None
        self._in_vain = 0.0  # how much estimates varied beyond when a new fit was not worth it

    @property
    def settings(self) -> dict[str, Any]:
        """What was chosen and found, in plain values."""
        return {
            "method": self.chosen_method,
            "refresh": repr(self.refresh),
            "log_likelihood_variance": self.variance,
            "max_pareto_k": self.max_pareto_k,
        }

    def start_over(self, source: ModelTarget, plan: RunPlan, engine: Engine) -> None:
        """Goes back to what was there before any run, so that a run repeats itself."""
        self.source, self.plan, self.engine = source, plan, engine
        self._window, self._remark, self.max_pareto_k = [], None, math.nan
        self._in_vain = 0.0
        if isinstance(source.model, MarginalModel):
            source.model.untune()

    def tell_of_pilot(self) -> None:
        """Says what was wrong where the estimator was fitted."""
        model = self.source.model
        if not isinstance(model, MarginalModel):
            return
        found = model.prepared
        if found.remark:
            self.plan.say(found.remark, first=True)
        elif found.distance > FAR:
            self.plan.say(
                "the search for the posterior's mode did not come to rest; the chains may start "
                f"{found.distance:.2g} posterior standard deviations from it, and warm-up "
                "has to find the rest of the way."
            )

    def transition(self, potential: Potential, position: Tensor) -> Transition:
        """The move of parameters and noise, for chains that start at given positions."""
        steps = self.trajectories.expected_steps(potential.dimension)
        if not potential.noise_sites and not self.required:
            kind = self.trajectories.kind
            if self.engine.is_native(potential, position, self.plan, steps, kind):
                return self.trajectories.native_transition(potential)
            return self.trajectories.parameter_transition(potential, len(position))
        if not potential.noise_sites:
            raise ValueError(
                "the model has no noise sites: expected a model from `marginalize`, or one that "
                "calls `pyro_hamflow.noise`; for other models use `HMC` or `NUTS`"
            )
        chosen = self.method == "auto"
        self.chosen_method = self._choose(potential, position) if chosen else self.method
        joint = self.chosen_method == "joint"
        kind, refresh = ("gradients", None) if joint else (self.trajectories.kind, self.refresh)
        looks = partial(looks_of, potential, refresh)
        if self.engine.is_native(potential, position, self.plan, steps, kind, looks):
            return self.trajectories.native_estimate_transition(potential, refresh)
        if joint:
            return self.trajectories.joint_transition(potential, len(position))
        inner = self.trajectories.parameter_transition(potential, len(position))
        return ConditionalTransition(inner, self.refresh, Blocks(potential))

    def _choose(self, potential: Potential, position: Tensor) -> str:
        """Which of the two ways serves, by the variance of the estimate where the chains start."""
        self.variance = variance_at(potential, position)
        recovery, model = potential.recovery, self.source.model
        one = recovery.num_choices == 1
        is_path = one and isinstance(model, MarginalModel) and model.proposal.fades
        most = _LARGEST_PATH_VARIANCE if is_path else _LARGEST_VARIANCE
        if recovery.factorises and not one and self.variance <= _LARGEST_FACTORISED_VARIANCE:
            method, why = "conditional", "each element's noise is refreshed on its own"
        elif self.variance <= most:
            method, why = "conditional", "fresh noise is often accepted as a whole"
        elif is_path:
            method, why = "joint", "noise of a path moves with the parameters at little cost"
        else:
            method, why = "joint", "with the noise held, the parameters could move little"
        if self.variance > _SLOW_VARIANCE:
            why += "; more particles would let them move further"
        if self._remark in self.plan.messages:
            self.plan.messages.remove(self._remark)
        self.plan.say(
            f"the log-likelihood estimate has variance {self.variance:.3g} where the chains "
            f"start; moves are {method} ({why})."
        )
        self._remark = self.plan.messages[-1]
        return method

    def note(self, state: State) -> None:
        """Keeps the positions of one iteration of warm-up."""
        self._window.append(state.position)

    def retuned(
        self, state: State, *, may_move: bool = True
    ) -> tuple[Potential, Tensor, Tensor] | None:
        """Fits the estimator anew, at the mean of the window's draws, where that is worth it.

        Nothing changes where the estimate's variance is small enough, for a new estimator means new
        programs; but where it is far smaller, fewer particles are taken.

        Arguments:
            state: Where chains are.
            may_move: Whether the proposal may be fitted elsewhere. Between modes there is no place
                that serves them all, and a proposal that was fitted at one would hide the others.

        Returns:
            The new target, with the positions and fresh noise; none if nothing has changed. A
            fit by which some chain's estimate is no number is not kept.
        """
        window, self._window = self._window, []
        model, potential = self.source.model, self.source.potential
        if not isinstance(model, MarginalModel) or model.proposal.is_final or not window:
            return None
        data = Arguments(potential.args, potential.kwargs)
        draws = [potential.constrain(row) for row in state.position[:_LOOKS]]
        centre = torch.cat(window[len(window) // 2 :]).mean(0)
        with random_state_kept():
            better, middle = None, potential.constrain(centre)
            variance, moves = variance_at(potential, state.position), self.chosen_method == "joint"
            wanted = wanted_variance(model.proposal, moves=moves)
            if potential.recovery.factorises:
                wanted = _WANTED_FACTORISED_VARIANCE
            if (is_noisy := variance > wanted) and not model.proposal.needs_fit:
                better = more_particles(model, draws, data)
            elif is_noisy and may_move:
                better = refit_at(model, middle, draws, data, moves=moves)
            elif may_move and (found := self._noisy_beyond(model, state.position, centre)):
                beyond, level = found
                far = [potential.constrain(row) for row in beyond]
                better = refit_at(model, middle, far, data, beyond=True, moves=moves)
                self._in_vain = level if better is None else 0.0
            elif variance < _LAVISH_VARIANCE and model.proposal.needs_fit:
                better = fewer_particles(model, draws, data)
            candidate = better or copy.copy(model)
            if candidate.may_choose_proposal:
                remark = mend_proposal(candidate, draws[: 1 if may_move else _LOOKS], data)
                if remark is not None:
                    self.plan.say(remark, first=True)
                    is_mended = candidate.proposal is not model.proposal
                    better = candidate if is_mended else better
            if better is None:
                return None
            kept = model.prepared
            model.adopt(better)
            potential = self.source.capture(*data)
        try:
            return self._at(potential, state)
        except ValueError:  # a chain is far off, and the proposal does not follow to there
            model.take_over(kept)
            return self._at(self.source.capture(*data), state)

    def _at(self, potential: Potential, state: State) -> tuple[Potential, Tensor, Tensor]:
        """A new target, with chains where they are and fresh noise."""
        return potential, *find_start(potential, len(state.position), state.position, 0.0)

    def _noisy_beyond(
        self, model: MarginalModel, position: Tensor, centre: Tensor
    ) -> tuple[Tensor, float] | None:
        """Where the posterior's edges may be, and how much estimates vary there, if too much.

        Chains that move with the noise held hardly go where estimates vary, for most are too low.
        Where a new fit was not worth it, the next window would find the same, at the cost of all
        else in warm-up.
        """
        if not model.proposal.fades or model.proposal.closer() is None:
            return None
        potential = self.source.potential
        places, variances = places_beyond(potential, position, centre)
        if not len(places):
            return None
        level = float(variances.median())
        if not bool((variances > _LARGEST_VARIANCE).any()):
            far = [potential.constrain(row) for row in places[:_LOOKS]]
            level = tail(model, far, Arguments(potential.args, potential.kwargs))
            if level <= NARROW:
                return None
        return None if level < _WORSE * self._in_vain else (places, level)

    def examine(self, state: State) -> None:
        """Looks at the frozen estimator at the last draws of warm-up; says first what is wrong."""
        model, potential = self.source.model, self.source.potential
        self.variance = variance_at(potential, state.position)
        if self.variance > _NOISY_VARIANCE:
            self.plan.say(
                "the log-likelihood estimate is too noisy at the chains' own draws, with variance "
                f"{self.variance:.3g}: take more particles, `points='rqmc'` or another proposal.",
                first=True,
            )
        if not isinstance(model, MarginalModel):
            return
        data = Arguments(potential.args, potential.kwargs)
        draws = [potential.constrain(row) for row in state.position[:_LOOKS]]
        with random_state_kept():
            looks = [look(model, draw, data) for draw in draws]
            self.max_pareto_k = max(found.max_pareto_k for found in looks)
            remark = misses(model, draws, data)
        if remark:
            self.plan.say(remark, first=True)
        variance = self.variance
        if model.proposal.fades:
            with random_state_kept():
                places, beyond = places_beyond(potential, state.position, state.position.mean(0))
            variance = max([variance, *beyond.tolist()])
            draws += [potential.constrain(row) for row in places[:_LOOKS]]
            if remark := told_of_tails(model, draws, data):
                self.plan.say(remark, first=True)
        other = model.proposal.alternative(model.sites, variance)
        if other:
            self.plan.say(other)
