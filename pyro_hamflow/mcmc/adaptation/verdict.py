"""Whether a learned energy pays: what is measured of it, and what follows from that."""

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


@dataclass
class SurrogateReport:
    """How a surrogate came about, and what it is good for.

    Attributes:
        trainings: What each training took and reached, the first, and each after a refill of data.
        n_gradients: True gradients spent on its data, over all chains.
        acceptance: The mean acceptance rate in the trial's second half.
        true_seconds: Of an iteration along true gradients, measured.
        surrogate_seconds: Of an iteration of the surrogate, measured.
        correction: ``"endpoint"`` or ``"per leaf"``: where the surrogate is judged.
        following: ``"surrogate"`` or ``"true gradients"``: what the draws follow.
        reason: Why, in a sentence.
    """

    trainings: list[EnergyTraining] = field(default_factory=list)
    n_gradients: int = 0
    acceptance: float = math.nan
    true_seconds: float = math.nan
    surrogate_seconds: float = math.nan
    correction: str = "endpoint"
    following: str = "surrogate"
    reason: str = ""


class Trial:
    """Iterations of a transition, as they were measured.

    Attributes:
        infos: What happened in each.
        times: Seconds of each.
    """

    def __init__(self) -> None:
        self.infos: list[Info] = []
        self.times: list[float] = []

    def note(self, info: Info, seconds: float) -> None:
        """Takes in an iteration."""
        self.infos.append(info)
        self.times.append(seconds)

    def mean(self, count: str) -> float:
        """The mean over iterations of a count, which is that of the chain with the most."""
        found = [float(torch.as_tensor(getattr(info, count)).max()) for info in self.infos]
        return statistics.fmean(found) if found else 1.0

    def seconds(self, num_proposals: int) -> float:
        """Of an iteration, where so many share what the first of them does.

        Such groups do the same work: the fastest counts, and one that was cut short is taken for
        whole. Single iterations differ, and their median counts.
        """
        count = num_proposals
        groups = range(0, max(1, len(self.times) - count + 1), count)
        sums = [sum(self.times[i : i + count]) for i in groups]
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


class Costs(NamedTuple):
    """Seconds of an iteration of each kind, all chains together, measured or foreseen.

    Attributes:
        mine: Of the one that was tried.
        per_leaf: Of one that is judged at every point.
        true: Of one along true gradients.
    """

    mine: float
    per_leaf: float
    true: float


def costs_of(
    trial: Trial,
    clock: Clock,
    *,
    num_proposals: int,
    length: float,
    steps: float,
    true_share: float,
) -> Costs:
    """What a trial cost, and what the alternatives would.

    Arguments:
        trial: What was tried.
        clock: What the true potential's programs take.
        num_proposals: How many iterations' proposals were made and judged together.
        length: How many steps that took, one after the other.
        steps: Of a trajectory, in the alternatives.
        true_share: How often true gradients are followed all the same.
    """
    potential, chains = clock.potential, len(trial.infos[-1].accepted)
    gradient = clock.seconds_later("gradient", chains)
    density = clock.seconds_later("evaluate", chains)
    judging = clock.seconds("evaluate", chains * num_proposals)
    asked, judged = trial.mean("n_gradients") * gradient, trial.mean("n_densities")
    walked = max(trial.seconds(num_proposals) - (asked + judged * judging) / num_proposals, 0.0)
    each = walked * num_proposals / length
    if potential.programs.compile_graphs:
        each *= COMPILED
    if num_proposals == 1:  # as it will be in the draws
        judging = density
    noisy = bool(potential.noise_dimension)  # which is then refreshed, the gradient computed again
    mine = walked + (asked + judged * judging) / num_proposals
    per_leaf = steps * (density + each) + 3.0 * noisy * density
    true = steps * (gradient + each) + noisy * (gradient + 2.0 * density)
    return Costs(mine + true_share * true, per_leaf, true)


def not_worth_it(acceptance: float, efficiency: float, true: float, mine: float) -> str | None:
    """Why true gradients are worth more than the surrogate, if so.

    Arguments:
        acceptance: Of the surrogate's proposals.
        efficiency: What a draw of the surrogate is worth, beside one along true gradients.
        true: Seconds of an iteration along these.
        mine: Seconds of one of the surrogate's.
    """
    if efficiency * true > _DOUBT * mine:
        return None
    return (
        f"{acceptance:.0%} of the surrogate's proposals were accepted, at {1e3 * mine:.2g} "
        f"milliseconds each, where an iteration along true gradients takes {1e3 * true:.2g}"
    )
