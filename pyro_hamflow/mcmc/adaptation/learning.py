"""What the phases of a run along a learned energy share, and the phase that explores along it.

A run gathers true gradients, fits a network, explores along it while it gathers more, fits again,
tries the result, and draws along it, or along true gradients where these are worth more.
"""

from __future__ import annotations

import time

import torch

from pyro_hamflow.mcmc.adaptation.attune import attuned
from pyro_hamflow.mcmc.adaptation.base import Moves, Phase, Sample
from pyro_hamflow.mcmc.adaptation.metric import Covariance
from pyro_hamflow.mcmc.adaptation.step_and_mass import warmed
from pyro_hamflow.mcmc.adaptation.surrogate_engine import leave_to_torch, surrogate_engine
from pyro_hamflow.mcmc.adaptation.surrogate_moves import AlongSurrogate, SurrogateMoves
from pyro_hamflow.mcmc.adaptation.surrogate_run import SurrogateRun
from pyro_hamflow.mcmc.adaptation.tune import Tune
from pyro_hamflow.mcmc.adaptation.verdict import Trial
from pyro_hamflow.mcmc.adaptation.window import WarmUp
from pyro_hamflow.mcmc.transitions.base import Info, State, Transition, Tuning, padded
from pyro_hamflow.mcmc.transitions.multiple_proposal import MultipleProposalTransition
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.surrogates.costs import synchronize
from pyro_hamflow.surrogates.learner import Learner
from pyro_hamflow.surrogates.targets import SurrogateDensity

_SETTLING = 60  # iterations
_FEWEST_VISITED = 10  # positions for each dimension, to know the mass by
_HOPE = 3.0  # by which a network may gain from what it has not seen yet


class Learning:
    """What the phases of a run along a learned energy know, and which follows which.

    Arguments:
        run: What was chosen, and the report.
        learner: Keeps what true gradients find, and fits networks to it.
        num_chains: How many chains.
        dense: Whether the mass is a whole matrix.

    Attributes:
        moves: The transitions, on the present target.
        trial: The iterations of the present kind, as they were measured.
        visited: The covariance of positions that the surrogate has led to.
    """

    def __init__(
        self, run: SurrogateRun, learner: Learner, num_chains: int, *, dense: bool
    ) -> None:
        self.run = run
        self.learner = learner
        self.num_chains = num_chains
        self.moves = SurrogateMoves(learner.potential, run, num_chains)
        self.trial = Trial()
        potential = learner.potential
        self.visited = Covariance(potential.dimension, dense=dense, device=potential.example.device)
        self._trajectories = run.hamiltonian.trajectories
        self._step_and_mass = run.hamiltonian.step_and_mass
        self._transition: Transition | None = None  # along the surrogate, once there is one

    @property
    def potential(self) -> Potential:
        """The true target, as its estimator is now."""
        return self.moves.potential

    def gathering_moves(self) -> Transition:
        """Moves along true gradients that the learner observes."""
        return self.moves.gathering(self.learner.log.observe)

    def gather_anew(self, potential: Potential) -> Transition:
        """The same on a target that has changed; forgets what was learned of the old one."""
        self.learner.start_over(potential, self.run.iteration)
        self.trial = Trial()
        self.moves = SurrogateMoves(potential, self.run, self.num_chains)
        return self.gathering_moves()

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
            reason = self._objection(_HOPE)
            if reason is not None:
                return self.give_up(state, tuning, reason)
        return self.follow_surrogate(state, tuning, passing=not last)

    def follow_surrogate(
        self, state: State, tuning: Tuning, *, passing: bool
    ) -> tuple[Phase, State]:
        """Follows the surrogate from here on, in a trial.

        Arguments:
            state: Where chains are.
            tuning: What moves were tuned to.
            passing: Whether the network will be fitted again: then its proposals are cheaper, and
                true gradients are gathered around them.
        """
        run, moves, network = self.run, self.moves, self.run.surrogate
        if network is None:
            raise RuntimeError("there is no surrogate yet: learn one first")
        remaining, choices = run.plan.warmup_steps - run.iteration, run.choices
        density = SurrogateDensity(self.potential, network)
        engine = surrogate_engine(
            run, self.potential, density, state.position, state.noise, moves.refresh
        )
        self.learner.clock.judge = engine.energy or self.potential
        if remaining and (len(run.report.trainings) == 1 or not passing):
            rows = state.position.repeat_interleave(choices.num_proposals, 0)
            spread = self.learner.covariance
            inner = engine.make_inner(len(rows))
            tuning = attuned(run.hamiltonian, self.potential, inner, density, rows, tuning, spread)
        warmup = self._step_and_mass.warm_up(
            self.potential, tuning, remaining, adapt_step_size=False, adapt_mass=False
        )
        if run.report.correction == "per leaf" and not passing:
            self.trial = Trial(known_steps=self.trial.trajectory_steps)
            self._transition = moves.per_leaf(network)
            leave_to_torch(run)
        else:
            num_transitions = 1 if passing else choices.num_transitions
            true_share = 0.0 if passing else choices.true_share / choices.num_proposals
            self.trial = Trial(choices.num_proposals, num_transitions, true_share)
            self._transition = moves.at_endpoint(density, engine, num_transitions)
            moves.rehearse(self._transition, state, tuning)
        start = self._transition.state_at(state.position, state.noise)
        return Explore(self, self._transition, warmup, passing=passing), start

    def conclude(self, state: State, tuning: Tuning) -> tuple[Phase, State]:
        """Decides at the end of warm-up, by the last trial, what draws will follow."""
        run, estimator = self.run, self.run.hamiltonian.estimator
        self.learner.log.entries.clear()
        if estimator is not None and self.potential.noise_sites:
            with random_state_kept():
                estimator.examine(state)
        if not self.trial.infos:
            run.say("the surrogate that was given is followed, without a trial.")
            return self._settle(state, tuning)
        reason = self._objection()
        if reason is not None:
            return self.give_up(state, tuning, reason)
        run.say(
            f"the surrogate is followed: {run.report.acceptance:.0%} of its proposals were "
            "accepted in the trial."
        )
        return self._settle(state, tuning)

    def _settle(self, state: State, tuning: Tuning) -> tuple[Phase, State]:
        """Draws along the surrogate from here on, and along true gradients now and then."""
        transition, moves, share = self._transition, self.moves, self.run.choices.true_share
        if transition is None:
            raise RuntimeError("there is no surrogate yet: learn one first")
        moves.rehearse(transition, state, tuning)
        along = Moves(transition, tuning, moves.trajectories)
        advance = AlongSurrogate(along, moves, share)
        return Sample(transition, advance, tuning), transition.state_at(state.position, state.noise)

    def give_up(self, state: State, tuning: Tuning, reason: str) -> tuple[Phase, State]:
        """Follows true gradients from here on."""
        run, moves, potential = self.run, self._step_and_mass, self.potential
        run.report.following = "true gradients"
        run.say(f"true gradients are followed: {reason}.")
        transition = run.true_moves(state.position)
        if moves.adapt_mass_matrix and self.visited.count > _FEWEST_VISITED * potential.dimension:
            inverse_mass = self.visited.inverse_mass(tuning.kinetic.inverse_mass)
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
        """Why training would cost too much beside the draws' true gradients, if it would."""
        if not self.run.choices.fallback:
            return None
        steps = self.trial.mean("n_steps")
        seconds = self.learner.clock.true_seconds(self.num_chains, steps)
        return self.learner.too_costly(seconds * steps * self.run.draws_ahead)

    def _objection(self, hope: float = 1.0) -> str | None:
        """Why true gradients are worth more, by the trial that has ended; its verdict is stored.

        Arguments:
            hope: How many times as efficient the surrogate may still become.
        """
        verdict = self.trial.verdict(self.learner.clock)
        self.run.report.verdict = verdict
        return verdict.objection(hope) if self.run.choices.fallback else None

    def is_for_leaves(self) -> bool:
        """Whether to judge every point of a trajectory from here on, if that is left open.

        Where correction at the endpoint pays, it is kept.
        """
        choices = self.run.choices
        if choices.correction != "auto" or not choices.fallback:
            return False
        return self.trial.verdict(self.learner.clock).is_for_leaves


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
        learning.visited.update(state.position)
        return state, info

    def _gather_around(self, draws: list[State], info: Info) -> Info:
        position = torch.cat([draw.position for draw in draws])
        noise = torch.cat([draw.noise for draw in draws])
        learning, count = self.learning, len(draws)
        densities = learning.learner.gather_around(position, noise, learning.moves.refresh_at)
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
        due = under_way and run.iteration == learning.learner.mid_trial
        if due and learning.is_for_leaves():
            run.report.correction = "per leaf"
            return learning.follow_surrogate(state, self.tuning, passing=False)
        return None
