"""A run along a learned energy: true gradients, a network, a trial, a decision, and draws."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.metric import Covariance
from pyro_hamflow.mcmc.adaptation.verdict import WeighingKernel
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    ParameterTransition,
    State,
    Transition,
    Tuning,
    padded,
)
from pyro_hamflow.mcmc.transitions.multiple_proposal import EndpointTransition
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafConditionalTransition, PerLeafTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.model.start import find_start
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate
from pyro_hamflow.surrogates.costs import SurrogateReport, Trial
from pyro_hamflow.surrogates.gradient_log import synchronize
from pyro_hamflow.surrogates.learner import FEWEST_GATHER, Learner, Lessons
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity, TrustRegion

_ATTUNED_BY, _SHORT = 2560, 15  # transitions in all, and points of their trajectories at most
_FEWEST_ATTUNED, _MOST_ATTUNED = 20, 40  # iterations that they are made in
_USUAL = 0.99  # of a surrogate's draws lie where it is not softened
_UNIT_STEP = 0.5  # where the scale is about one
_SETTLING = 60  # iterations
_FEWEST_VISITED = 10  # positions for each dimension, to know the mass by
_DEEPEST = 10  # doublings of a true trajectory that is learned from
_HOPE = 3.0  # by which a network may gain from what it has not seen yet


class LearningKernel(WeighingKernel):
    """What a kernel does with the choices of :class:`Neural <pyro_hamflow.mcmc.kernels.hnn.Neural>`.

    Each iteration is of one kind: it gathers true gradients, explores along the surrogate while
    that is learned and tried, or draws.

    Attributes:
        lessons: What is learned.
        surrogate: The network that is followed.
        report: What it took to learn it, and what it is good for.
    """

    lessons: Lessons
    num_transitions: int
    num_proposals: int
    true_share: float
    trust_radius: float

    def start_over(self, warmup_steps: int) -> None:
        """Forgets all of a run, to begin another with this much warm-up."""
        self.report = SurrogateReport()
        self.report.correction = "endpoint" if self.correction == "auto" else self.correction
        self.surrogate: PotentialNetwork | None = None
        self._learner = None
        self._true: Transition | None = None
        self._visited = Covariance(0, dense=True)
        self._judged: JudgedDensity | None = None
        self._iteration, self._total = 0, warmup_steps
        self._gathering = False
        self._trial = Trial()
        self._steps = math.nan

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
            self._gathering = self.given is None
            if not self._gathering:
                state = self._send_ahead(state, passing=False)
                if warmup_steps == 0:
                    state = self._conclude(state)
        return state

    def _may_go_on(self) -> bool:
        """What is learned has its share of a warm-up of a given length."""
        return self._learner is None and super()._may_go_on()

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
        if initial_params is None and self.init_strategy is None:
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
        if self.surrogate is None or self._first_inverse_mass is not None:
            return kinetic
        inverse_mass = self.surrogate.root @ self.surrogate.root.mT
        return self._like(kinetic, inverse_mass.to(potential.example))

    def _like(self, kinetic: GaussianKinetic, inverse_mass: Tensor) -> GaussianKinetic:
        """A mass by a spread, whole or its diagonal, of the structure that the kernel's has."""
        if kinetic.inverse_mass.dim() == 1:
            return GaussianKinetic(inverse_mass.diag() if inverse_mass.dim() == 2 else inverse_mass)
        return GaussianKinetic(self._mass_form(self.potential).shaped(inverse_mass))

    def make_transition(self, potential: Potential, position: Tensor) -> Transition:
        given = self.surrogate
        if given is not None and given.dimension != potential.dimension:
            raise ValueError(
                f"`surrogate` has dimension {given.dimension}: expected {potential.dimension}, as "
                f"the model's sites {[site.name for site in potential.sites]} have"
            )
        if self.report.following == "true gradients":  # settled, whatever target they are of
            return self._make_true(potential, position)
        self._learner = None
        learner = Learner(potential, self.lessons, self._total, self._iteration)
        with torch.random.fork_rng():  # so that a run that learns nothing is the plain kernel's
            reason = self._hopeless(learner, position)
        if reason is not None:
            self._say(f"true gradients are followed: {reason}.")
            self.report.following = "true gradients"
            return self._make_true(potential, position)
        self._learner = learner
        dense = self._first_kinetic(potential).inverse_mass.dim() == 2
        self._visited = Covariance(potential.dimension, dense=dense)
        learner.recorder.calls_ahead = learner.wanted / len(position) + self._total
        recorder, chains = cast(Potential, learner.recorder), len(position)
        self._true = self._with_refresh(self.make_parameter_transition(recorder, chains))
        # Before a scale is known, only No-U-Turn trajectories go as far as they should.
        return self._with_refresh(NUTSTransition(recorder, chains, _DEEPEST))

    def _with_refresh(self, inner: ParameterTransition) -> Transition:
        """A move of the parameters, and of the noise if there is any."""
        noisy = bool(self.potential.noise_sites)
        return ConditionalTransition(inner, self.refresh) if noisy else inner

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
            ended = isinstance(transition, EndpointTransition) and transition.ended(state)
            if ended and float(torch.rand(())) < self.true_share:
                return self._follow_truth(state)
            steps = self.draw_num_steps(warmup.tuning.step_size)
            return transition.step(state, warmup.tuning, steps)
        return self._explore(state)

    def is_opening(self) -> bool:
        """As it is without learning, but what is learned has to reach further than draws will."""
        reaching = self._gathering and self._iteration > FEWEST_GATHER
        return super().is_opening() and not reaching

    def _gather(self, state: State) -> tuple[State, Info]:
        """An iteration along true gradients, kept; the first training after the last of them."""
        learner, (warmup, _) = self._learning(), self._running()
        recorder = learner.recorder
        recorder.tuning, first = warmup.tuning, len(recorder.calls)
        state, info = super().advance(state)
        info = padded(info)
        self.report.n_gradients += int(torch.as_tensor(info.n_gradients).sum())
        if self._learner is not learner:  # the estimator was fitted anew, and so must all else be
            self._gathering, self._trial = self._learner is not None, Trial()
            if self._learner is not None:
                self._learner.recorder.calls.clear()
            return state, info
        recorder.settle(first, torch.as_tensor(info.n_steps))
        self._trial.note(info, 0.0)
        if learner.forget_start(self._iteration):
            self._trial = Trial()
        if learner.knows_enough(self._iteration, self.num_proposals):
            self._gathering = False
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
        self._trial.note(info, time.perf_counter() - began)
        learner = self._learning()
        if learner.recorder.recording and isinstance(transition, EndpointTransition):
            star = [state, *(later for later, _ in transition.ahead)]
            if len(star) == self.num_proposals:  # else it was looked at before
                gradients, densities = learner.look_about(star, self.refresh)
                self.report.n_gradients += gradients * len(state.position)
                info = info._replace(
                    n_gradients=info.n_gradients + gradients,
                    n_densities=info.n_densities + densities,
                )
        warmup.update(state, info)
        self._visited.update(state.position)
        if self._iteration in learner.refits:
            state = self._learn(state)
        elif warmup.finished:
            state = self._conclude(state)
        elif self._iteration == learner.verdict and self._leaves_promise_more():
            self.report.correction = "per leaf"
            state = self._send_ahead(state, passing=False)
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
        last = learner.is_last(self._iteration)
        try:
            training = learner.fit(passing=not last)
        except (ValueError, torch.linalg.LinAlgError) as error:
            return self._give_up(state, f"nothing could be learned: {error}")
        self.surrogate = learner.network
        self.report.trainings.append(training)
        if not first and (last or self.fallback):  # earlier, nothing else would follow from it
            reason = self._not_worth_it(_HOPE)
            if reason is not None:
                return self._give_up(state, reason)
        return self._send_ahead(state, passing=not last)

    def _send_ahead(self, state: State, *, passing: bool) -> State:
        """Follows the surrogate from here on; looks at true gradients too if it is passing."""
        assert self.surrogate is not None
        recorder, chains = self._learning().recorder, len(state.position)
        potential, tuning = recorder.potential, self._running()[0].tuning
        remaining = self._total - self._iteration
        self._steps = self._steps_of_trajectory()
        stars = remaining / self.num_proposals  # and more if it turns out to be worth while
        self._trial = Trial()
        recorder.recording, recorder.tuning = passing, None
        recorder.calls_ahead = stars
        density = SurrogateDensity(potential, self.surrogate, calls=0.0)
        if remaining and (len(self.report.trainings) == 1 or not passing):
            tuning = self._attuned(density, state.position, tuning)
        self._warmup = self._new_warmup(tuning, remaining, adapt_step_size=False, adapt_mass=False)
        if self.report.correction == "per leaf" and not passing:
            self._transition = self._per_leaf(self.surrogate, chains, remaining * self._steps)
        else:
            self._transition = EndpointTransition(
                potential,
                density,
                lambda rows: self.make_parameter_transition(cast(Potential, density), rows),
                chains,
                self.refresh,
                num_transitions=1 if passing else self.num_transitions,
                num_proposals=self.num_proposals,
                num_stars=stars,
            )
            self._rehearse(state)
        return self._transition.begin(state.position, state.noise)

    def _rehearse(self, state: State) -> None:
        """Makes a step in vain, so that what it compiles is not part of what is timed."""
        warmup, transition = self._running()
        with torch.random.fork_rng():
            begun = transition.begin(state.position, state.noise)
            steps = self.draw_num_steps(warmup.tuning.step_size)
            transition.step(begun, warmup.tuning, steps)

    def _per_leaf(self, surrogate: PotentialNetwork, chains: int, calls: float) -> Transition:
        """The transition that is judged at every point, so many of which are foreseen."""
        potential = self._learning().recorder.potential
        radius = self.trust_radius * float(surrogate.reach)
        trust = TrustRegion(radius, 1.5 * radius) if math.isfinite(radius) else None
        self._judged = judged = JudgedDensity(potential, surrogate, trust, calls=calls)
        likewise = cast(Potential, judged)
        inner = self.make_parameter_transition(likewise, chains)
        leaf = PerLeafTransition(likewise, judged, inner)
        return PerLeafConditionalTransition(leaf, self.refresh) if potential.noise_sites else leaf

    def _attuned(self, density: SurrogateDensity, position: Tensor, tuning: Tuning) -> Tuning:
        """The step size that suits the surrogate, found on it alone, and the mass by its spread.

        Arguments:
            density: The surrogate, whose level is set to the energy that few of its draws exceed.
            position: Where chains are.
            tuning: Of which is kept what is not to be adapted.
        """
        covariance, kinetic = self._learning().covariance, tuning.kinetic
        if self.adapt_mass_matrix and covariance is not None:
            kinetic = self._like(kinetic, covariance)
        tuning = Tuning(_UNIT_STEP if self.adapt_step_size else tuning.step_size, kinetic)
        position = position.repeat_interleave(self.num_proposals, 0)
        count = min(max(_ATTUNED_BY // len(position), _FEWEST_ATTUNED), _MOST_ATTUNED)
        warmup = self._new_warmup(tuning, count, adapt_mass=False)
        inner = self.make_parameter_transition(cast(Potential, density), len(position))
        state = inner.begin(position, position[:, :0])
        moves = self._warmed(warmup, inner, state, _SHORT)
        energies = [moved.evaluation.value for moved, _ in moves]
        late = torch.cat(energies[count // 2 :])
        density.level.copy_(late.nanquantile(_USUAL))
        return warmup.tuning

    def _conclude(self, state: State) -> State:
        """The decision at the end of warm-up."""
        self._learning().recorder.calls.clear()
        if self.potential.noise_sites:
            self._examine(state)
        if not self._trial.infos:
            self._say("the surrogate that was given is followed, without a trial.")
            return self._settle(state)
        self.report.acceptance = self._trial.rate
        reason = self._not_worth_it()
        if reason is not None:
            return self._give_up(state, reason)
        self._say(
            f"the surrogate is followed: {self.report.acceptance:.0%} of its proposals were "
            "accepted in the trial."
        )
        return self._settle(state)

    def _settle(self, state: State) -> State:
        """Has programs compiled that will be called often enough from here on."""
        transition, steps = self._running()[1], self._steps_of_trajectory()
        if self._judged is not None:
            self._judged.calls = self._draws_ahead() * steps
        if isinstance(transition, EndpointTransition):
            transition.num_stars = self._draws_ahead() / self.num_proposals
            transition.surrogate.calls = transition.num_stars * self.num_transitions * steps
            recorder = self._learning().recorder
            recorder.calls_ahead = self.true_share * transition.num_stars * steps
            recorder.seconds(len(state.position))
        self._rehearse(state)
        return transition.begin(state.position, state.noise)

    def _give_up(self, state: State, reason: str) -> State:
        """Follows true gradients from here on."""
        potential, warmup = self._learning().recorder.potential, self._running()[0]
        self._learner = None
        self.report.following = "true gradients"
        self._say(f"true gradients are followed: {reason}.")
        self._transition = self._make_true(potential, state.position)
        tuning = warmup.tuning
        if self.adapt_mass_matrix and self._visited.count > _FEWEST_VISITED * potential.dimension:
            inverse_mass = self._visited.inverse_mass(tuning.kinetic.inverse_mass)
            tuning = tuning._replace(kinetic=self._like(tuning.kinetic, inverse_mass))
        self._warmup = warmup = self._new_warmup(tuning, self._total - self._iteration)
        state = self._transition.begin(state.position, state.noise)
        if not warmup.finished:
            return state
        # The step suited the surrogate, and another mass: these iterations find the one to keep.
        self._warmup = warmup = self._new_warmup(tuning, _SETTLING, adapt_mass=False)
        for moved, info in self._warmed(warmup, self._transition, state):
            state = moved
            self.report.n_gradients += int(torch.as_tensor(padded(info).n_gradients).sum())
        return state

    def _warmed(
        self, warmup: WarmUp, transition: Transition, state: State, most: float = math.inf
    ) -> Iterator[tuple[State, Info]]:
        """The iterations of a warm-up, of so many steps at most."""
        while not warmup.finished:
            steps = self.draw_num_steps(warmup.tuning.step_size)
            state, info = transition.step(state, warmup.tuning, int(min(steps, most)))
            warmup.update(state, info)
            yield state, info

    def _say(self, sentence: str) -> None:
        self.report.reason = sentence
        self.messages.append(f"{type(self).__name__}: {sentence}")

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_learner": None, "_true": None, "_judged": None}
