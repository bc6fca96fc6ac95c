"""A run along a learned energy: true gradients, a network, a trial, a decision, and draws."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.amortized import AmortizedSurrogate
from pyro_hamflow.mcmc.learner import Learner, Lessons
from pyro_hamflow.mcmc.per_leaf import (
    JudgedDensity,
    PerLeafConditionalTransition,
    PerLeafTransition,
    TrustRegion,
)
from pyro_hamflow.mcmc.pseudo_marginal import ConditionalTransition
from pyro_hamflow.mcmc.recorder import synchronize
from pyro_hamflow.mcmc.surrogate import EndpointTransition, SurrogateDensity
from pyro_hamflow.mcmc.surrogate_costs import SurrogateReport, Trial
from pyro_hamflow.mcmc.transition import Info, State, Transition, padded
from pyro_hamflow.mcmc.weighing import WeighingKernel
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start

_HOPE = 3.0  # by which a network may gain from what it has not seen yet


class LearningKernel(WeighingKernel):
    """What a kernel does with the choices of :class:`~pyro_hamflow.mcmc.neural.Neural`.

    Each iteration is of one kind: it gathers true gradients, explores along the surrogate while
    that is learned and tried, or draws.

    Attributes:
        lessons: What is learned.
        surrogate: The network that is followed.
        report: What it took to learn it, and what it is good for.
    """

    lessons: Lessons
    num_transitions: int
    true_share: float
    trust_radius: float

    def start_over(self, warmup_steps: int) -> None:
        """Forgets all of a run, to begin another with this much warm-up."""
        self.report = SurrogateReport()
        self.report.correction = "endpoint" if self.correction == "auto" else self.correction
        self.surrogate: PotentialNetwork | None = None
        self._learner = None
        self._true: Transition | None = None
        self._iteration, self._total = 0, warmup_steps
        self._gathering = False
        self._trial = Trial()
        self._steps = math.nan
        self._true_share = 0.0

    # --- from the first iteration to the last ----------------------------------------------------

    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> State:
        self.start_over(warmup_steps)
        state = super().begin(num_chains, warmup_steps, args, kwargs, initial_params)
        if self._learner is not None:
            self._learner.recorder.calls.clear()
            tuning = self._running()[0].tuning
            self._gathering = self.given is None
            if not self._gathering:
                self._warmup = self._new_warmup(tuning, warmup_steps)
                state = self._send_ahead(state, passing=False)
                if warmup_steps == 0:
                    state = self._conclude(state)
        return state

    def _start(
        self, potential: Potential, num_chains: int, initial_params: Mapping[str, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Where the surrogate that was given knows its way, if it was trained on data like these.

        Elsewhere it may have valleys that are none of the posterior's, and hold a chain.
        """
        given = self.given
        if not isinstance(given, AmortizedSurrogate):
            self.surrogate = given
            return super()._start(potential, num_chains, initial_params)
        self.surrogate = given.at(potential)
        self.report.n_gradients += given.n_probes
        if initial_params is None:
            centre, _ = potential.vectors(num_chains)
            centre = self.surrogate.centre + torch.randn_like(centre) @ self.surrogate.root.mT
            try:
                return find_start(potential, num_chains, centre, 0.0)
            except ValueError:
                pass  # led astray by data unlike those of its training
        return super()._start(potential, num_chains, initial_params)

    def _first_kinetic(self, potential: Potential) -> GaussianKinetic:
        """By the spread of a surrogate that was given, unless told otherwise."""
        kinetic = super()._first_kinetic(potential)
        given = self._first_inverse_mass is not None or self.mass == "identity"
        if self.surrogate is None or given:
            return kinetic
        inverse_mass = self.surrogate.root @ self.surrogate.root.mT
        if kinetic.inverse_mass.dim() == 1:
            inverse_mass = inverse_mass.diag()
        return GaussianKinetic(inverse_mass.to(potential.example))

    def make_transition(self, potential: Potential, position: Tensor) -> Transition:
        given = self.surrogate
        if given is not None and given.dimension != potential.dimension:
            raise ValueError(
                f"`surrogate` has dimension {given.dimension}: expected {potential.dimension}, as "
                f"the model's sites {[site.name for site in potential.sites]} have"
            )
        learner = Learner(potential, self.lessons, self._total)
        with torch.random.fork_rng():  # so that a run that learns nothing is the plain kernel's
            reason = self._hopeless(learner, position)
        if reason is not None:
            self._say(f"true gradients are followed: {reason}.")
            self.report.following = "true gradients"
            return self._make_true(potential, position)
        self._learner = learner
        inner = self.make_parameter_transition(cast(Potential, learner.recorder), len(position))
        self._true = ConditionalTransition(inner, self.refresh) if potential.noise_sites else inner
        return self._true

    def _make_true(self, potential: Potential, position: Tensor) -> Transition:
        """What the kernel would be without a surrogate."""
        if potential.noise_sites:
            return super().make_transition(potential, position)
        return self.make_parameter_transition(potential, len(position))

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains; gathers, learns and tries while warm-up lasts."""
        state, info = self._move(state)
        return state, padded(info)

    def _move(self, state: State) -> tuple[State, Info]:
        if self._learner is None:
            return super().advance(state)
        self._iteration += 1
        if self._gathering:
            return self._gather(state)
        warmup, transition = self._running()
        if warmup.finished:
            if self.true_share and float(torch.rand(())) < self._true_share:
                return self._follow_truth(state)
            steps = self.draw_num_steps(warmup.tuning.step_size)
            return transition.step(state, warmup.tuning, steps)
        return self._explore(state)

    def _gather(self, state: State) -> tuple[State, Info]:
        """An iteration along true gradients, kept; the first training after the last of them."""
        learner, (warmup, _) = self._learning(), self._running()
        recorder = learner.recorder
        recorder.tuning, first = warmup.tuning, len(recorder.calls)
        state, info = super().advance(state)
        info = padded(info)
        recorder.settle(first, torch.as_tensor(info.n_steps))
        self._trial.note(info, 0.0)
        self.report.n_gradients += int(torch.as_tensor(info.n_gradients).sum())
        if learner.forget_start(self._iteration):
            self._trial = Trial()
        if learner.knows_enough(self._iteration):
            self._gathering = False
            self._warmup = self._new_warmup(warmup.tuning, self._total - self._iteration)
            reason = self._too_dear(len(state.position))
            if reason is not None:
                return self._give_up(state, reason), info
            state = self._learn(state)
        return state, info

    def _explore(self, state: State) -> tuple[State, Info]:
        """An iteration along the surrogate; true gradients at its proposals while it learns."""
        warmup, transition = self._running()
        began = time.perf_counter()
        steps = self.draw_num_steps(warmup.tuning.step_size)
        state, info = transition.step(state, warmup.tuning, steps)
        synchronize(state.position)
        rate = info.acceptance_rate
        if isinstance(transition, EndpointTransition):
            if transition.inner_rate is not None:
                rate = transition.inner_rate
            if transition.observer is not None:
                info = info._replace(n_gradients=info.n_gradients + 1)
                self.report.n_gradients += len(state.position)
        self._trial.note(info, time.perf_counter() - began)
        warmup.update(state.position, rate)
        if self._iteration in self._learning().refits:
            state = self._learn(state)
        elif warmup.finished:
            state = self._conclude(state)
        elif self._iteration == self._learning().verdict and self._leaves_promise_more():
            self.report.correction = "per leaf"
            state = self._send_ahead(state, passing=False)
            warmup.restart(warmup.tuning.step_size)
        return state, info

    def _follow_truth(self, state: State) -> tuple[State, Info]:
        """A transition along true gradients among those of the surrogate."""
        assert self._true is not None
        tuning = self._running()[0].tuning
        begun = self._true.begin(state.position, state.noise)
        moved, info = self._true.step(begun, tuning, self.draw_num_steps(tuning.step_size))
        densities = info.n_densities + (1 if state.noise.shape[1] else 0)
        info = info._replace(n_gradients=info.n_gradients + 1, n_densities=densities)
        return moved._replace(gradient=torch.zeros_like(state.position)), info

    # --- learning ---------------------------------------------------------------------------------

    def _learn(self, state: State) -> State:
        """Fits the network to all that is known, and follows it."""
        learner, first = self._learning(), self.surrogate is None
        try:
            training = learner.fit()
        except (ValueError, torch.linalg.LinAlgError) as error:
            return self._give_up(state, f"nothing could be learned: {error}")
        self.surrogate = learner.network
        self.report.trainings.append(training)
        last = learner.is_last(self._iteration)
        if not first and (last or self.fallback):  # earlier, nothing else would follow from it
            reason = self._not_worth_it(1.0 if last else _HOPE)
            if reason is not None:
                return self._give_up(state, reason)
        return self._send_ahead(state, passing=not last)

    def _send_ahead(self, state: State, *, passing: bool) -> State:
        """Follows the surrogate from here on; looks at true gradients too if it is passing."""
        assert self.surrogate is not None
        recorder, chains = self._learning().recorder, len(state.position)
        potential = recorder.potential
        self._steps = self._steps_of_trajectory()
        self._trial = Trial()
        recorder.recording = passing
        if self.report.correction == "per leaf" and not passing:
            radius = self.trust_radius * float(self.surrogate.reach)
            trust = TrustRegion(radius, 1.5 * radius) if math.isfinite(radius) else None
            judged = JudgedDensity(potential, self.surrogate, trust)
            inner = self.make_parameter_transition(cast(Potential, judged), chains)
            leaf = PerLeafTransition(potential, judged, inner)
            self._transition = (
                PerLeafConditionalTransition(leaf, self.refresh) if potential.noise_sites else leaf
            )
        else:
            density = SurrogateDensity(potential, self.surrogate, passing=passing)
            self._transition = endpoint = EndpointTransition(
                potential,
                density,
                self.make_parameter_transition(cast(Potential, density), chains),
                self.refresh,
                num_transitions=1 if passing else self.num_transitions,
            )
            self._true_share = 0.0 if passing else self.true_share
            if passing:
                endpoint.observer = recorder.graph("gradient", chains)
        return self._transition.begin(state.position, state.noise)

    def _conclude(self, state: State) -> State:
        """The decision at the end of warm-up."""
        self._learning().recorder.calls.clear()
        if not self._trial.infos:
            self._say("the surrogate that was given is followed, without a trial.")
            return state
        self.report.acceptance = self._trial.rate
        reason = self._not_worth_it()
        if reason is not None:
            return self._give_up(state, reason)
        true_steps = self._true_share * self._draws_ahead() * self._steps_of_trajectory()
        self._learning().recorder.compile_for(true_steps, len(state.position))
        self._say(
            f"the surrogate is followed: {self.report.acceptance:.0%} of its proposals were "
            "accepted in the trial."
        )
        return state

    def _give_up(self, state: State, reason: str) -> State:
        """Follows true gradients from here on."""
        potential, warmup = self._learning().recorder.potential, self._running()[0]
        self._learner = None
        self.report.following = "true gradients"
        self._say(f"true gradients are followed: {reason}.")
        self._transition = self._make_true(potential, state.position)
        warmup.restart(warmup.tuning.step_size)
        state = self._transition.begin(state.position, state.noise)
        if warmup.finished:  # what the first step compiles is not part of the draws' time
            with torch.random.fork_rng():
                steps = self.draw_num_steps(warmup.tuning.step_size)
                self._transition.step(state, warmup.tuning, steps)
        return state

    def _say(self, sentence: str) -> None:
        self.report.reason = sentence
        self.messages.append(f"{type(self).__name__}: {sentence}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_learner": None, "_true": None}
