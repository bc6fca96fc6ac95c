"""The phases of a run along a learned energy: gather, explore, decide, draw."""

from __future__ import annotations

import math
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.mcmc.adaptation.base import Phase, Sample
from pyro_hamflow.mcmc.adaptation.estimator import EstimatorTuning
from pyro_hamflow.mcmc.adaptation.metric import Covariance
from pyro_hamflow.mcmc.adaptation.step_and_mass import warmed
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateRun
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.adaptation.verdict import (
    Costs,
    Trial,
    costs_of,
    not_worth_it,
)
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.mcmc.transitions.base import (
    Info,
    ParameterTransition,
    State,
    Transition,
    Tuning,
    padded,
)
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.mcmc.transitions.noise_refresh import Blocks, CorrelatedRefresh, Refresh
from pyro_hamflow.mcmc.transitions.nuts import NUTSTransition
from pyro_hamflow.mcmc.transitions.per_leaf import PerLeafConditionalTransition, PerLeafTransition
from pyro_hamflow.mcmc.transitions.pseudo_marginal import ConditionalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.surrogates.costs import synchronize
from pyro_hamflow.surrogates.gradient_log import LeapfrogSettings
from pyro_hamflow.surrogates.learner import FEWEST_GATHER, Learner
from pyro_hamflow.surrogates.potential_network import PotentialNetwork
from pyro_hamflow.surrogates.targets import JudgedDensity, SurrogateDensity, TrustRegion

GUESSED_STEPS = 16  # of a trajectory, before any was seen
_ATTUNED_BY, _SHORT = 2560, 15  # transitions in all, and points of their trajectories at most
_FEWEST_ATTUNED, _MOST_ATTUNED = 20, 40  # iterations that they are made in
_USUAL = 0.99  # of a surrogate's draws lie where it is not softened
_UNIT_STEP = 0.5  # where the scale is about one
_SETTLING = 60  # iterations
_FEWEST_VISITED = 10  # positions for each dimension, to know the mass by
DEEPEST = 10  # doublings of a true trajectory that is learned from
_HOPE = 3.0  # by which a network may gain from what it has not seen yet


class Learning:
    """What the phases of a run along a learned energy do together.

    Arguments:
        run: What is known of the run.
        learner: Keeps what true gradients find, and fits networks to it.
        num_chains: How many chains.
        dense: Whether the mass is a whole matrix.

    Attributes:
        trial: The iterations of the present kind, as they were measured.
    """

    def __init__(
        self, run: SurrogateRun, learner: Learner, num_chains: int, *, dense: bool
    ) -> None:
        self.run = run
        self.learner = learner
        self.num_chains = num_chains
        self.trial = Trial()
        self._visited = Covariance(learner.potential.dimension, dense=dense)
        self._trajectories = run.hamiltonian.trajectories
        self._step_and_mass = run.hamiltonian.step_and_mass
        self._transition: Transition | None = None  # along the surrogate, once there is one
        self._passing = False
        self._steps = math.nan
        self._take(learner.potential)

    def _take(self, potential: Potential) -> None:
        """Takes a target, the first or one whose estimator was fitted anew."""
        self.potential = potential
        self._true = self.with_refresh(
            self._trajectories.parameter_transition(potential, self.num_chains)
        )

    def gathering_moves(self) -> Transition:
        """True moves that the learner observes.

        Before a scale is known, only No-U-Turn trajectories go as far as they should.
        """
        observe = self.learner.log.observe
        return self.with_refresh(NUTSTransition(self.potential, self.num_chains, DEEPEST, observe))

    def gather_anew(self, potential: Potential) -> Transition:
        """True moves on a target that has changed, of which nothing is known yet."""
        self.learner.start_over(potential, self.run.iteration)
        self.trial = Trial()
        self._take(potential)
        return self.gathering_moves()

    def with_refresh(self, inner: ParameterTransition) -> Transition:
        """A move of the parameters, and of the noise if there is any."""
        if not self.potential.noise_sites:
            return inner
        return ConditionalTransition(inner, self._refresh, Blocks(self.potential))

    @property
    def _refresh(self) -> Refresh:
        estimator = self.run.hamiltonian.estimator
        return CorrelatedRefresh() if estimator is None else estimator.refresh

    def refresh_at(self, position: Tensor, noise: Tensor) -> tuple[Tensor, int]:
        """Noise that suits other positions, and how many densities it took."""
        evaluate = partial(self.potential.evaluate, position)
        blocks = Blocks(self.potential)
        noise, *_, count = self._refresh(blocks, noise, evaluate(noise), evaluate)
        return noise, count + 1

    # --- what follows what ------------------------------------------------------------------------

    def learn(self, state: State, tuning: Tuning) -> tuple[Phase, State]:
        """Fits the network to all that is known, and follows it."""
        run, learner, first = self.run, self.learner, self.run.surrogate is None
        last = learner.is_last(run.iteration)
        try:
            training = learner.fit(passing=not last)
        except (ValueError, torch.linalg.LinAlgError) as error:
            return self.give_up(state, tuning, f"nothing could be learned: {error}")
        run.surrogate = learner.network
        run.report.trainings.append(training)
        if not first and (last or run.choices.fallback):  # earlier, nothing would follow from it
            reason = self._not_worth_it(_HOPE)
            if reason is not None:
                return self.give_up(state, tuning, reason)
        return self.follow_surrogate(state, tuning, passing=not last)

    def follow_surrogate(
        self, state: State, tuning: Tuning, *, passing: bool
    ) -> tuple[Phase, State]:
        """Follows the surrogate from here on; looks at true gradients too if it is passing."""
        run, network = self.run, self.run.surrogate
        if network is None:
            raise RuntimeError("there is no surrogate yet: learn one first")
        remaining = run.plan.warmup_steps - run.iteration
        self._steps = self._steps_of_trajectory()
        self.trial, self._passing = Trial(), passing
        density = SurrogateDensity(self.potential, network)
        if remaining and (len(run.report.trainings) == 1 or not passing):
            tuning = self._attuned(density, state.position, tuning)
        warmup = self._step_and_mass.warm_up(
            self.potential, tuning, remaining, adapt_step_size=False, adapt_mass=False
        )
        if run.report.correction == "per leaf" and not passing:
            self._transition = self._per_leaf(network)
        else:
            self._transition = MultipleProposalTransition(
                self.potential,
                density,
                lambda rows: self._trajectories.parameter_transition(density, rows),
                self.num_chains,
                self._refresh,
                Blocks(self.potential),
                num_transitions=1 if passing else run.choices.num_transitions,
                num_proposals=run.choices.num_proposals,
            )
            self._rehearse(self._transition, state, tuning)
        begun = self._transition.state_at(state.position, state.noise)
        return Explore(self, self._transition, warmup, passing=passing), begun

    def _rehearse(self, transition: Transition, state: State, tuning: Tuning) -> None:
        """Makes a step in vain, so that what is captured for it is not part of what is timed."""
        with torch.random.fork_rng():
            begun = transition.state_at(state.position, state.noise)
            steps = self._trajectories.draw_num_steps(tuning.step_size)
            transition.step(begun, tuning, steps)

    def _per_leaf(self, network: PotentialNetwork) -> Transition:
        """The transition that is judged at every point."""
        radius = self.run.choices.trust_radius * float(network.reach)
        trust = TrustRegion(radius, 1.5 * radius) if math.isfinite(radius) else None
        judged = JudgedDensity(self.potential, network, trust)
        inner = self._trajectories.parameter_transition(judged, self.num_chains)
        leaf = PerLeafTransition(judged, inner)
        if not self.potential.noise_sites:
            return leaf
        return PerLeafConditionalTransition(leaf, self._refresh, Blocks(self.potential))

    def _attuned(self, density: SurrogateDensity, position: Tensor, tuning: Tuning) -> Tuning:
        """The step size that suits the surrogate, found on it alone, and the mass by its spread.

        Arguments:
            density: The surrogate, whose level is set to the energy that few of its draws exceed.
            position: Where chains are.
            tuning: Of which is kept what is not to be adapted.
        """
        moves, covariance = self._step_and_mass, self.learner.covariance
        kinetic, size = tuning.kinetic, tuning.step_size
        if moves.adapt_mass_matrix and covariance is not None:
            kinetic = moves.kinetic_by(self.potential, covariance, kinetic)
        tuning = Tuning(_UNIT_STEP if moves.adapt_step_size else size, kinetic)
        position = position.repeat_interleave(self.run.choices.num_proposals, 0)
        count = min(max(_ATTUNED_BY // len(position), _FEWEST_ATTUNED), _MOST_ATTUNED)
        warmup = moves.warm_up(self.potential, tuning, count, adapt_mass=False)
        inner = self._trajectories.parameter_transition(density, len(position))
        state = inner.state_at(position, position[:, :0])
        steps = warmed(warmup, inner, self._trajectories, state, _SHORT)
        energies = [moved.evaluation.value for moved, _ in steps]
        late = torch.cat(energies[count // 2 :])
        density.softened_above.copy_(late.nanquantile(_USUAL))
        return warmup.tuning

    def conclude(self, state: State, tuning: Tuning) -> tuple[Phase, State]:
        """The decision at the end of warm-up."""
        run, estimator = self.run, self.run.hamiltonian.estimator
        self.learner.log.entries.clear()
        if estimator is not None and self.potential.noise_sites:
            with torch.random.fork_rng():
                estimator.examine(state)
        if not self.trial.infos:
            run.say("the surrogate that was given is followed, without a trial.")
            return self._settle(state, tuning)
        run.report.acceptance = self.trial.rate
        reason = self._not_worth_it()
        if reason is not None:
            return self.give_up(state, tuning, reason)
        run.say(
            f"the surrogate is followed: {run.report.acceptance:.0%} of its proposals were "
            "accepted in the trial."
        )
        return self._settle(state, tuning)

    def _settle(self, state: State, tuning: Tuning) -> tuple[Phase, State]:
        """Draws along the surrogate from here on, and along true gradients now and then."""
        transition, trajectories = self._transition, self._trajectories
        if transition is None:
            raise RuntimeError("there is no surrogate yet: learn one first")
        self._rehearse(transition, state, tuning)

        def advance(state: State) -> tuple[State, Info]:
            ended = isinstance(transition, MultipleProposalTransition) and transition.ended(state)
            if ended and float(torch.rand(())) < self.run.choices.true_share:
                return self._follow_truth(state, tuning)
            return transition.step(state, tuning, trajectories.draw_num_steps(tuning.step_size))

        return Sample(transition, advance, tuning), transition.state_at(state.position, state.noise)

    def _follow_truth(self, state: State, tuning: Tuning) -> tuple[State, Info]:
        """A transition along true gradients among those of the surrogate."""
        begun = self._true.state_at(state.position, state.noise)
        steps = self._trajectories.draw_num_steps(tuning.step_size)
        moved, info = self._true.step(begun, tuning, steps)
        densities = info.n_densities + (1 if state.noise.shape[1] else 0)
        info = info._replace(n_gradients=info.n_gradients + 1, n_densities=densities)
        return moved._replace(gradient=torch.zeros_like(state.position)), info

    def give_up(self, state: State, tuning: Tuning, reason: str) -> tuple[Phase, State]:
        """Follows true gradients from here on."""
        run, moves, potential = self.run, self._step_and_mass, self.potential
        run.report.following = "true gradients"
        run.say(f"true gradients are followed: {reason}.")
        transition = run.true_moves(state.position)
        if moves.adapt_mass_matrix and self._visited.count > _FEWEST_VISITED * potential.dimension:
            inverse_mass = self._visited.inverse_mass(tuning.kinetic.inverse_mass)
            kinetic = moves.kinetic_by(potential, inverse_mass, tuning.kinetic)
            tuning = tuning._replace(kinetic=kinetic)
        left = run.plan.warmup_steps - run.iteration
        warmup = moves.warm_up(potential, tuning, left)
        state = transition.state_at(state.position, state.noise)
        if warmup.finished:
            # The step suited the surrogate, and another mass: these iterations find one to keep.
            warmup = moves.warm_up(potential, tuning, _SETTLING, adapt_mass=False)
            for moved, info in warmed(warmup, transition, self._trajectories, state):
                state = moved
                run.report.n_gradients += int(torch.as_tensor(padded(info).n_gradients).sum())
        estimator = run.hamiltonian.estimator if potential.noise_sites else None
        phase = Tune(transition, self._trajectories, moves, warmup, run.plan, estimator)
        return phase, state

    # --- whether it pays --------------------------------------------------------------------------

    def too_costly(self) -> str | None:
        """Why not to train after all, if so."""
        if not self.run.choices.fallback:
            return None
        seconds = self.learner.clock.seconds_later("gradient", self.num_chains)
        return self.learner.too_costly(seconds * self.trial.mean("n_steps") * self.run.draws_ahead)

    def _not_worth_it(self, hope: float = 1.0) -> str | None:
        """Why the surrogate is worth less than true gradients, by what was measured, if so.

        Arguments:
            hope: How many times as good it may become.
        """
        report, costs = self.run.report, self._costs()
        report.true_seconds, report.surrogate_seconds = costs.true, costs.mine
        return self._loses_by(costs, hope) if self.run.choices.fallback else None

    def _loses_by(self, costs: Costs, hope: float = 1.0) -> str | None:
        """Why these costs speak for true gradients, if so."""
        several = isinstance(self._transition, MultipleProposalTransition)
        efficiency = self.trial.efficiency if several else 1.0
        return not_worth_it(self.trial.rate, hope * efficiency, costs.true, costs.mine)

    def leaves_promise_more(self) -> bool:
        """Whether a correction at every point would be worth it, were nothing refused then.

        Where that at the endpoint is, it is kept.
        """
        choices = self.run.choices
        if choices.correction != "auto" or not choices.fallback:
            return False
        costs = self._costs()
        if self._loses_by(costs) is None:
            return False
        return not_worth_it(1.0, 1.0, costs.true, costs.per_leaf) is None

    def _costs(self) -> Costs:
        steps, transition = self._steps_of_trajectory(), self._transition
        count, length, true_share = 1, steps, 0.0
        if isinstance(transition, MultipleProposalTransition):
            count = transition.num_proposals
            length = 2 * transition.num_transitions * steps
            true_share = 0.0 if self._passing else self.run.choices.true_share / count
        return costs_of(
            self.trial,
            self.learner.clock,
            num_proposals=count,
            length=length,
            steps=steps,
            true_share=true_share,
        )

    def _steps_of_trajectory(self) -> float:
        """Of the latest whose number of steps was not changed by a correction at each of them."""
        if not self.trial.infos:
            return GUESSED_STEPS
        if isinstance(self._transition, MultipleProposalTransition):
            transition = self._transition
            legs = transition.num_transitions * (1.0 + 1.0 / transition.num_proposals)
            return self.trial.mean("n_steps") / legs
        return self.trial.mean("n_steps") if math.isnan(self._steps) else self._steps

    def visit(self, state: State) -> None:
        """Takes in where the surrogate has led."""
        self._visited.update(state.position)


class Gather(Tune):
    """Follows true gradients, and keeps what they find, until a network can be fitted to it.

    Arguments are those of :class:`~pyro_hamflow.mcmc.adaptation.tune.Tune`, and ``learning``.
    """

    def __init__(self, *arguments: Any, learning: Learning) -> None:
        super().__init__(*arguments)
        self.learning = learning

    @property
    def is_opening(self) -> bool:
        """As it is without learning, but what is learned has to reach further than draws will."""
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
        """Begins the search for the step size anew; what single steps find on trial is not kept."""
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


class Explore:
    """Follows the surrogate, and looks at true gradients where it leads; or tries it as it is.

    Arguments:
        learning: What the phases do together.
        transition: The move along the surrogate.
        warmup: Counts iterations.
        passing: Whether the network will be fitted again.
    """

    def __init__(
        self, learning: Learning, transition: Transition, warmup: WarmUp, *, passing: bool
    ) -> None:
        self.learning = learning
        self.transition = transition
        self.warmup = warmup
        self.passing = passing

    @property
    def tuning(self) -> Tuning:
        return self.warmup.tuning

    @property
    def adapting(self) -> bool:
        return True

    @property
    def remaining(self) -> int:
        return self.warmup.remaining

    def advance(self, state: State) -> tuple[State, Info]:
        learning, run = self.learning, self.learning.run
        run.iteration += 1
        began = time.perf_counter()
        steps = run.hamiltonian.trajectories.draw_num_steps(self.tuning.step_size)
        state, info = self.transition.step(state, self.tuning, steps)
        synchronize(state.position)
        learning.trial.note(info, time.perf_counter() - began)
        if self.passing and isinstance(self.transition, MultipleProposalTransition):
            draws = [state, *(later for later, _ in self.transition.ahead)]
            if len(draws) == run.choices.num_proposals:  # else they were looked at before
                info = self._gather_around(draws, info)
        self.warmup.update(state, info)
        learning.visit(state)
        return state, info

    def _gather_around(self, draws: list[State], info: Info) -> Info:
        position = torch.cat([draw.position for draw in draws])
        noise = torch.cat([draw.noise for draw in draws])
        learning, count = self.learning, len(draws)
        densities = learning.learner.gather_around(position, noise, learning.refresh_at)
        learning.run.report.n_gradients += len(position)
        return info._replace(
            n_gradients=info.n_gradients + count,
            n_densities=info.n_densities + count * densities,
        )

    def successor(self, state: State) -> tuple[Phase, State] | None:
        learning, run = self.learning, self.learning.run
        under_way = bool(learning.trial.infos)
        if under_way and run.iteration in learning.learner.refits:
            return learning.learn(state, self.tuning)
        if self.warmup.finished:
            return learning.conclude(state, self.tuning)
        due = under_way and run.iteration == learning.learner.verdict
        if due and learning.leaves_promise_more():
            run.report.correction = "per leaf"
            return learning.follow_surrogate(state, self.tuning, passing=False)
        return None
