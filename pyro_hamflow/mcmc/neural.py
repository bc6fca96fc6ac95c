"""How a kernel learns an energy in its warm-up, and whether it follows it from there on."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.training import (
    Loss,
    Points,
    Training,
    Trajectories,
    TrajectoryMatching,
    fit_energy,
)
from pyro_hamflow.mcmc.amortized import AmortizedSurrogate
from pyro_hamflow.mcmc.pseudo_marginal import ConditionalTransition
from pyro_hamflow.mcmc.pseudo_marginal_kernels import PseudoMarginal
from pyro_hamflow.mcmc.recorder import Recorder, synchronize
from pyro_hamflow.mcmc.surrogate import (
    EndpointTransition,
    JudgedDensity,
    PerLeafConditionalTransition,
    PerLeafTransition,
    SurrogateDensity,
    TrustRegion,
)
from pyro_hamflow.mcmc.surrogate_costs import (
    SurrogateReport,
    Trial,
    affordable_steps,
    not_worth_it,
    timed,
    training_seconds,
)
from pyro_hamflow.mcmc.transition import Info, State, Transition, Tuning
from pyro_hamflow.mcmc.warmup import WarmUp
from pyro_hamflow.model.potential import Potential

_CORRECTIONS = ("endpoint", "per leaf")
_FEWEST_WARMUP = 60
_FEWEST_GATHER, _MOST_GATHER = 12, 0.3
_POINTS_PER_DIMENSION = 150
_TRIAL_SHARE = 0.15
_MOST_POINTS = 20_000
_GUESSED_STEPS = 16
_FEWEST_STEPS = 200  # of the optimiser, that teach something
_COMPILED = 0.15  # of an uncompiled program's time
_FIRST_RATE, _LATER_RATE = 1e-2, 5e-3


class Neural(PseudoMarginal):
    """What makes a kernel follow a learned energy: gathering, training, trial, decision.

    Warm-up begins with true gradients, and everything that they find along the way is kept. A
    network is fitted to it, sent ahead, corrected by true gradients where its proposals end, and
    fitted again. A trial then measures what it accepts and what it costs, and true gradients are
    followed from there on if that is worth more; the run's messages say so.

    Arguments:
        model: A Pyro model; noise sites are moved as by the pseudo-marginal kernels.
        surrogate: An energy that was trained before, to be used as it is, or one of
            :func:`~pyro_hamflow.learn_surrogate`, to be used at the run's data.
        correction: ``"endpoint"`` judges by one true energy where a surrogate transition ends;
            ``"per leaf"`` weighs every point of its trajectory by the true energy.
        num_transitions: How many surrogate transitions are made for one true energy.
        true_share: The share of transitions that follow true gradients even so, where the
            correction is made at the endpoint: where the surrogate is poor, they lead out.
        correlation: Of the noise before and after an endpoint move.
        trust_radius: How far from the centre, in multiples of the distance within which 99 of 100
            training points lie, the learned gradient is followed alone, where the correction is
            per leaf; beyond one and a half times that, the true one is. If infinite, nowhere.
        hidden: The widths of the network's hidden layers.
        outputs: How many outputs of it are summed.
        loss: What is made small in training; gradients and energies are matched if not given.
        training_points: How many true gradients are gathered, over all chains, before the first
            training, in three tenths of warm-up at most; 150 for each dimension, and 300, if not
            given.
        training_steps: The most steps of the optimiser in each training.
        rounds: How often the network is sent ahead and fitted again.
        fallback: Whether true gradients are followed where the surrogate would not pay. That
            depends on measured times, so that a seed repeats a run for certain only without it.
        settings: The other arguments of the kernel.

    Raises:
        TypeError: If the model is not callable, or the surrogate no network.
        ValueError: If a number lies outside its range; when run, if the surrogate has another
            dimension than the model, or the model has faults.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        surrogate: PotentialNetwork | AmortizedSurrogate | None = None,
        correction: str = "endpoint",
        num_transitions: int = 1,
        true_share: float = 0.02,
        correlation: float = 0.0,
        trust_radius: float = 1.5,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        loss: Loss | None = None,
        training_points: int | None = None,
        training_steps: int = 1000,
        rounds: int = 3,
        fallback: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(model, **settings)
        if not isinstance(surrogate, PotentialNetwork | AmortizedSurrogate | None):
            raise TypeError(
                f"`surrogate` is a {type(surrogate).__name__}: expected a PotentialNetwork, or "
                "what `learn_surrogate` returns"
            )
        if correction not in _CORRECTIONS:
            raise ValueError(f"`correction` is {correction!r}: expected one of {_CORRECTIONS}")
        for name, number, least in (
            ("num_transitions", num_transitions, 1),
            ("training_points", 1 if training_points is None else training_points, 1),
            ("training_steps", training_steps, 1),
            ("rounds", rounds, 0),
        ):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise ValueError(f"`{name}` is {number!r}: expected an integer, {least} or more")
        if not 0 <= true_share <= 1:
            raise ValueError(f"`true_share` is {true_share}: expected 0 <= true_share <= 1")
        if not 0 <= correlation < 1:
            raise ValueError(f"`correlation` is {correlation}: expected 0 <= correlation < 1")
        if not trust_radius > 0:
            raise ValueError(f"`trust_radius` is {trust_radius}: expected a positive number")
        with torch.random.fork_rng():
            PotentialNetwork(1, hidden=hidden, outputs=outputs)  # refuses bad sizes
        self.correction = correction
        self.num_transitions = num_transitions
        self.true_share = true_share
        self.correlation = correlation
        self.trust_radius = trust_radius
        self.hidden = tuple(hidden)
        self.outputs = outputs
        self.loss = loss
        self.training_points = training_points
        self.training_steps = training_steps
        self.rounds = rounds
        self.fallback = fallback
        self.report = SurrogateReport()
        self._given = surrogate
        self.surrogate: PotentialNetwork | None = None
        self._forget()

    def _forget(self) -> None:
        self._recorder: Recorder | None = None
        self._true: Transition | None = None
        self._iteration = self._total = 0
        self._gathering = False
        self._refits: list[int] = []
        self._trial = Trial()
        self._true_share = 0.0
        self._training_steps = self.training_steps

    # --- from the first iteration to the last ----------------------------------------------------

    def begin(
        self,
        num_chains: int,
        warmup_steps: int,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
        initial_params: Mapping[str, Tensor] | None = None,
    ) -> State:
        self._forget()
        self.report = SurrogateReport()
        self.surrogate = None
        self._total = warmup_steps
        state = super().begin(num_chains, warmup_steps, args, kwargs, initial_params)
        if self._recorder is not None:
            self._recorder.calls.clear()
            tuning = self._running()[0].tuning
            self._gathering = self._given is None
            if not self._gathering:
                self._warmup = self._new_warmup(tuning, warmup_steps)
                state = self._send_ahead(state, passing=False)
                if warmup_steps == 0:
                    state = self._conclude(state)
        return state

    def make_transition(self, potential: Potential, position: Tensor) -> Transition:
        given = self._given
        if isinstance(given, AmortizedSurrogate):
            given = given.at(potential)
        self.surrogate = given
        if given is not None and given.dimension != potential.dimension:
            raise ValueError(
                f"`surrogate` has dimension {given.dimension}: expected {potential.dimension}, as "
                f"the model's sites {[site.name for site in potential.sites]} have"
            )
        with torch.random.fork_rng():  # so that a run that learns nothing is the plain kernel's
            reason = self._hopeless(potential, position)
        if reason is not None:
            self._say(f"true gradients are followed: {reason}.")
            self.report.following = "true gradients"
            return self._make_true(potential, position)
        self._recorder = Recorder(potential)
        inner = self.make_parameter_transition(cast(Potential, self._recorder), len(position))
        self._true = ConditionalTransition(inner, self.refresh) if potential.noise_sites else inner
        return self._true

    def _make_true(self, potential: Potential, position: Tensor) -> Transition:
        """What the kernel would be without a surrogate."""
        if potential.noise_sites:
            return super().make_transition(potential, position)
        return self.make_parameter_transition(potential, len(position))

    def advance(self, state: State) -> tuple[State, Info]:
        """One iteration of all chains; gathers, learns and tries while warm-up lasts."""
        if self._recorder is None:
            state, info = super().advance(state)
            return state, padded(info)
        self._iteration += 1
        if self._gathering:
            return self._gather(state)
        warmup, transition = self._running()
        if warmup.finished:
            if self.true_share and float(torch.rand(())) < self._true_share:
                return self._follow_truth(state)
            steps = self.draw_num_steps(warmup.tuning.step_size)
            state, info = transition.step(state, warmup.tuning, steps)
            return state, padded(info)
        return self._explore(state)

    def _gather(self, state: State) -> tuple[State, Info]:
        """An iteration along true gradients, kept; the first training after the last of them."""
        recorder, (warmup, _) = self._recording(), self._running()
        recorder.tuning, first = warmup.tuning, len(recorder.calls)
        state, info = super().advance(state)
        recorder.settle(first, torch.zeros_like(info.accepted).long() + info.n_steps)
        self._trial.note(info, 0.0)
        self.report.n_gradients += int(torch.as_tensor(padded(info).n_gradients).sum())
        if self._iteration <= _FEWEST_GATHER // 3:
            recorder.calls.clear()  # from where chains came from
            self._trial = Trial()
        enough = self.training_points or _POINTS_PER_DIMENSION * (recorder.dimension + 2)
        full = self._iteration >= _FEWEST_GATHER and recorder.num_gradients >= enough
        if full or self._iteration >= _MOST_GATHER * self._total:
            self._gathering = False
            left = self._total - self._iteration
            explore = left - round(_TRIAL_SHARE * self._total)
            self._refits = [
                self._iteration + explore * (i + 1) // self.rounds for i in range(self.rounds)
            ]
            self._warmup = self._new_warmup(warmup.tuning, left)
            reason = self._too_dear()
            if reason is not None:
                return self._give_up(state, reason), padded(info)
            state = self._learn(state)
        return state, padded(info)

    def _explore(self, state: State) -> tuple[State, Info]:
        """An iteration along the surrogate; true gradients at its proposals while it learns."""
        warmup, transition = self._running()
        began = time.perf_counter()
        steps = self.draw_num_steps(warmup.tuning.step_size)
        state, info = transition.step(state, warmup.tuning, steps)
        synchronize(state.position)
        self._trial.note(info, time.perf_counter() - began)
        rate = info.acceptance_rate
        if isinstance(transition, EndpointTransition):
            if transition.inner_rate is not None:
                rate = transition.inner_rate
            if transition.observer is not None:
                info = info._replace(n_gradients=info.n_gradients + 1)
                self.report.n_gradients += len(state.position)
        warmup.update(state.position, rate)
        if self._iteration in self._refits:
            state = self._learn(state)
        elif warmup.finished:
            state = self._conclude(state)
        return state, padded(info)

    def _follow_truth(self, state: State) -> tuple[State, Info]:
        """A transition along true gradients among those of the surrogate."""
        assert self._true is not None
        tuning = self._running()[0].tuning
        begun = self._true.begin(state.position, state.noise)
        moved, info = self._true.step(begun, tuning, self.draw_num_steps(tuning.step_size))
        densities = info.n_densities + (1 if state.noise.shape[1] else 0)
        info = info._replace(n_gradients=info.n_gradients + 1, n_densities=densities)
        return moved._replace(gradient=torch.zeros_like(state.position)), padded(info)

    # --- learning ---------------------------------------------------------------------------------

    def _learn(self, state: State) -> State:
        """Fits the network to all that is known, and follows it."""
        first = self.surrogate is None
        try:
            network, training = self._fit()
        except (ValueError, torch.linalg.LinAlgError) as error:
            return self._give_up(state, f"nothing could be learned: {error}")
        self.surrogate = network
        self.report.trainings.append(training)
        last = self._iteration >= max([0, *self._refits])
        if last and not first:
            reason = self._not_worth_it()
            if reason is not None:
                return self._give_up(state, reason)
        return self._send_ahead(state, passing=not last)

    def _fit(self) -> tuple[PotentialNetwork, Training]:
        recorder, network = self._recording(), self.surrogate
        potential, rate = recorder.potential, _LATER_RATE
        points = recorder.points(_MOST_POINTS)
        examples: Points | Trajectories = points
        if isinstance(self.loss, TrajectoryMatching):
            examples = recorder.trajectories(self.loss.num_steps, _MOST_POINTS)
        if network is None:
            rate = _FIRST_RATE
            network = PotentialNetwork(
                potential.dimension, hidden=self.hidden, outputs=self.outputs
            ).to(potential.example)
            network.whiten_by(points.position)
        steps = self._training_steps
        return network, fit_energy(
            network, examples, loss=self.loss, steps=steps, learning_rate=rate
        )

    def _send_ahead(self, state: State, *, passing: bool) -> State:
        """Follows the surrogate from here on; looks at true gradients too if it is passing."""
        assert self.surrogate is not None
        recorder, chains = self._recording(), len(state.position)
        potential = recorder.potential
        self._trial = Trial()
        recorder.recording = passing
        if self.correction == "per leaf" and not passing:
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
                num_transitions=1 if passing else self.num_transitions,
                correlation=self.correlation,
            )
            self._true_share = 0.0 if passing else self.true_share
            if passing:
                endpoint.observer = recorder.graph("gradient", chains)
        return self._transition.begin(state.position, state.noise)

    def _conclude(self, state: State) -> State:
        """The decision at the end of warm-up."""
        self._recording().calls.clear()
        if not self._trial.rates:
            self._say("the surrogate that was given is followed, without a trial.")
            return state
        self.report.acceptance = self._trial.rate
        reason = self._not_worth_it()
        if reason is not None:
            return self._give_up(state, reason)
        self._say(
            f"the surrogate is followed: {self.report.acceptance:.0%} of its proposals were "
            "accepted in the trial."
        )
        return state

    def _give_up(self, state: State, reason: str) -> State:
        """Follows true gradients from here on."""
        potential, tuning = self._recording().potential, self._running()[0].tuning
        self._recorder = None
        self.report.following = "true gradients"
        self._say(f"true gradients are followed: {reason}.")
        self._transition = self._make_true(potential, state.position)
        self._warmup = self._new_warmup(tuning, self._total - self._iteration)
        return self._transition.begin(state.position, state.noise)

    # --- what pays --------------------------------------------------------------------------------

    def _hopeless(self, potential: Potential, position: Tensor) -> str | None:
        """Why not even to begin, if so."""
        total, fewest = self._total, _FEWEST_WARMUP
        if self._given is None and total < fewest:
            if not self.fallback:
                raise ValueError(
                    f"`warmup_steps` is {total}: expected {fewest} or more, to learn a surrogate in"
                )
            return f"nothing can be learned in {total} iterations of warm-up, below {fewest}"
        if not self.fallback or self._given is not None:
            return None
        noise = potential.draw_noise(len(position))
        seconds = timed(potential.graph("gradient", len(position)), position, noise)
        seconds *= _COMPILED if self.compile else 1.0
        return self._compare(_GUESSED_STEPS * seconds, potential)

    def _too_dear(self) -> str | None:
        """Why not to train after all, if so."""
        if not self.fallback:
            return None
        recorder = self._recording()
        seconds = recorder.seconds / recorder.runs * self._trial.mean_steps
        return self._compare(seconds, recorder.potential)

    def _compare(self, seconds: float, potential: Potential) -> str | None:
        """Why training would take too long, beside iterations of a length, if so.

        Where a full training would, it is cut short.
        """
        each = training_seconds(potential, self.hidden)
        ahead, fits = self._draws_ahead() * seconds, 1 + self.rounds
        self._training_steps = min(self.training_steps, affordable_steps(ahead, each * fits))
        if self._training_steps >= min(self.training_steps, _FEWEST_STEPS):
            return None
        return (
            f"the draws' gradients will take {ahead:.2g} seconds, and training would take "
            f"{each * fits * self.training_steps:.2g}"
        )

    def _not_worth_it(self) -> str | None:
        """Why the surrogate is worth less than true gradients, by what was measured, if so."""
        recorder, transition, rate = self._recording(), self._running()[1], self._trial.rate
        report = self.report
        report.true_seconds, report.surrogate_seconds = self._trial.costs(
            recorder.potential, transition, self._true_share, observed=recorder.recording
        )
        if not self.fallback:
            return None
        endpoint = isinstance(transition, EndpointTransition)
        efficiency = rate / (2.0 - rate) if endpoint else 1.0  # proposals refused are repeated
        return not_worth_it(rate, efficiency, report.true_seconds, report.surrogate_seconds)

    def _draws_ahead(self) -> int:
        planned = self.planned_draws
        return 2 * self._total if planned is None else planned

    def _recording(self) -> Recorder:
        assert self._recorder is not None
        return self._recorder

    def _new_warmup(self, tuning: Tuning, steps: int) -> WarmUp:
        return WarmUp(
            tuning.step_size,
            tuning.kinetic,
            steps,
            target=self.target_accept,
            adapt_step_size=self.adapt_step_size,
            adapt_mass=self.adapt_mass,
        )

    def _say(self, sentence: str) -> None:
        self.report.reason = sentence
        self.messages.append(f"{type(self).__name__}: {sentence}")

    @property
    def settings(self) -> dict[str, Any]:
        report = self.report
        return super().settings | {
            "following": report.following,
            "correction": self.correction,
            "num_transitions": self.num_transitions,
            "true_share": self.true_share,
            "correlation": self.correlation,
            "training_gradients": report.n_gradients,
            "training_seconds": sum(training.seconds for training in report.trainings),
            "training_loss": report.trainings[-1].best if report.trainings else None,
        }

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_recorder": None, "_true": None}


def padded(info: Info) -> Info:
    """With all statistics of each chain, whatever was followed."""
    still = torch.zeros_like(info.accepted)
    count, none = still.long(), torch.full_like(info.energy, math.nan)
    accepted, error = info.surrogate_accepted, info.surrogate_error
    return info._replace(
        n_steps=info.n_steps + count,
        n_gradients=info.n_gradients + count,
        n_densities=info.n_densities + count,
        surrogate_accepted=still if accepted is None else accepted,
        surrogate_error=none if error is None else error,
    )
