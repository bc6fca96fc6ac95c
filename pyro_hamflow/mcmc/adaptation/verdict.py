"""Whether a learned energy pays: what a trial measured of it, and what follows from that.

It is asked once, at the end of a trial, from the costs that were recorded; the answer is a
:class:`Verdict`, which is kept in the run's report.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from pyro_hamflow.mcmc.transitions.base import Info
from pyro_hamflow.surrogates.costs import COMPILED, Clock
from pyro_hamflow.surrogates.fit import EnergyTraining

_DOUBT = 2.0  # by which a surrogate has to promise more: a short trial sees few of the long stays
GUESSED_STEPS = 16  # of a trajectory, before there was any


class Costs(NamedTuple):
    """Seconds of one iteration, all chains together, measured or foreseen.

    Attributes:
        surrogate: Of an iteration as it was tried.
        per_leaf: Of one that is judged at every point of its trajectory.
        true: Of one along true gradients.
    """

    surrogate: float
    per_leaf: float
    true: float


@dataclass(frozen=True)
class Verdict:
    """Whether a surrogate pays, by one trial.

    Attributes:
        acceptance: The mean acceptance probability in the trial's second half.
        efficiency: What a draw of the surrogate is worth, beside one along true gradients.
        costs: Seconds of an iteration.
    """

    acceptance: float
    efficiency: float
    costs: Costs

    def objection(self, hope: float = 1.0) -> str | None:
        """Why true gradients are worth more than the surrogate, if they are.

        Arguments:
            hope: How many times as efficient the surrogate may still become.
        """
        if hope * self.efficiency * self.costs.true > _DOUBT * self.costs.surrogate:
            return None
        return (
            f"{self.acceptance:.0%} of the surrogate's proposals were accepted, at "
            f"{1e3 * self.costs.surrogate:.2g} milliseconds each, where an iteration along true "
            f"gradients takes {1e3 * self.costs.true:.2g}"
        )

    @property
    def is_for_leaves(self) -> bool:
        """Whether to judge every point instead: if endpoints lose, and points would not.

        Of points it is taken that none would be refused.
        """
        return self.objection() is not None and self.costs.true > _DOUBT * self.costs.per_leaf


@dataclass
class Trial:
    """Iterations of one kind of transition, as they were measured.

    Attributes:
        num_proposals: How many proposals are made and judged together, one for each iteration.
        num_transitions: How many surrogate transitions lead to the centre that proposals share, and
            from there to each of them; none where every point is judged, or gradients are true.
        true_share: How many iterations along true gradients will be made beside each of these.
        known_steps: The steps of a trajectory, where these iterations do not tell: where points are
            judged one by one, a wrong gradient ends trajectories early.
        infos: What happened in each iteration.
        times: Seconds of each.
    """

    num_proposals: int = 1
    num_transitions: int = 0
    true_share: float = 0.0
    known_steps: float = math.nan
    infos: list[Info] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def note(self, info: Info, seconds: float) -> None:
        """Takes in an iteration."""
        self.infos.append(info)
        self.times.append(seconds)

    def mean(self, count: str) -> float:
        """A count of the :class:`Info`, the largest of all chains, averaged over iterations.

        All chains wait for the one that takes most steps. One, if there were no iterations.
        """
        found = [float(torch.as_tensor(getattr(info, count)).max()) for info in self.infos]
        return statistics.fmean(found) if found else 1.0

    @property
    def trajectory_steps(self) -> float:
        """How many steps a trajectory takes."""
        if not self.infos:
            return GUESSED_STEPS
        if self.num_transitions:
            legs = self.num_transitions * (1.0 + 1.0 / self.num_proposals)
            return self.mean("n_steps") / legs
        return self.mean("n_steps") if math.isnan(self.known_steps) else self.known_steps

    @property
    def seconds(self) -> float:
        """Of an iteration: of proposals that are made together, the share of each.

        Sets of proposals all do the same work: the fastest counts, and the last, if it was cut
        short, is taken for whole. Single iterations differ, and their median counts.
        """
        count = self.num_proposals
        first = range(0, max(1, len(self.times) - count + 1), count)
        sums = [sum(self.times[i : i + count]) for i in first]
        return min(sums) / count if count > 1 else statistics.median(sums)

    @property
    def rate(self) -> float:
        """The mean acceptance probability in the second half."""
        rates = [info.acceptance_rate for info in self.infos[len(self.infos) // 2 :]]
        return float(torch.stack(rates).mean()) if rates else math.nan

    @property
    def efficiency(self) -> float:
        """What a draw is worth beside one of a chain that never stays where it is.

        A chain that forgets all when it moves has an autocorrelation time of the mean length of
        its stays, as a draw sees it: long stays hold more draws. This tells chains that stay
        everywhere a little from those that stay for long somewhere, which acceptance does not.
        """
        stays = torch.stack([info.accepted for info in self.infos]).long().cumsum(0)
        lengths = torch.stack([(stays == stay).sum(0) for stay in range(len(stays) + 1)])
        return float(lengths.sum() / lengths.square().sum())

    def verdict(self, clock: Clock) -> Verdict:
        """Whether what was tried pays.

        Arguments:
            clock: What the true potential's programs take.
        """
        efficiency = self.efficiency if self.num_transitions else 1.0
        return Verdict(self.rate, efficiency, costs_of(self, clock))


def costs_of(trial: Trial, clock: Clock) -> Costs:
    """What a trial cost, and what the alternatives would.

    Arguments:
        trial: What was tried.
        clock: What the true potential's programs take.
    """
    potential, chains, count = clock.potential, len(trial.infos[-1].accepted), trial.num_proposals
    steps = trial.trajectory_steps
    length = 2 * trial.num_transitions * steps if trial.num_transitions else steps
    gradient = clock.seconds_later("gradient", chains)
    density = clock.seconds_later("evaluate", chains)
    judging = clock.seconds_of_judging(chains * count)
    gradients, densities = trial.mean("n_gradients") * gradient, trial.mean("n_densities")
    learned = max(trial.seconds - (gradients + densities * judging) / count, 0.0)
    each = learned * count / length  # of a step along the learned gradient
    if potential.programs.compile_graphs:
        each *= COMPILED
    if count == 1:  # as it will be in the draws
        judging = density
    noisy = bool(potential.noise_dimension)  # which is then refreshed, the gradient computed again
    surrogate = learned + (gradients + densities * judging) / count
    per_leaf = steps * (density + each) + 3.0 * noisy * density
    followed = clock.true_seconds(chains, steps)
    true = steps * (followed + each) + noisy * (followed + 2.0 * density)
    return Costs(surrogate + trial.true_share * true, per_leaf, true)


@dataclass
class SurrogateReport:
    """How a surrogate came about, and what it is good for.

    Attributes:
        trainings: What each training took and reached, the first, and each after more was gathered.
        n_gradients: True gradients spent on its data, over all chains.
        verdict: Whether it pays, by the latest trial; none if there was no trial.
        correction: ``"endpoint"`` or ``"per leaf"``: where the surrogate is judged.
        following: ``"surrogate"`` or ``"true gradients"``: what the draws follow.
        reason: Why, in a sentence.
    """

    trainings: list[EnergyTraining] = field(default_factory=list)
    n_gradients: int = 0
    verdict: Verdict | None = None
    correction: str = "endpoint"
    following: str = "surrogate"
    reason: str = ""

    @property
    def acceptance(self) -> float:
        """The mean acceptance probability in the trial's second half."""
        return math.nan if self.verdict is None else self.verdict.acceptance

    @property
    def true_seconds(self) -> float:
        """Of an iteration along true gradients."""
        return math.nan if self.verdict is None else self.verdict.costs.true

    @property
    def surrogate_seconds(self) -> float:
        """Of an iteration of the surrogate."""
        return math.nan if self.verdict is None else self.verdict.costs.surrogate
