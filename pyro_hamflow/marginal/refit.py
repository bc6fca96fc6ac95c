"""A proposal that is fitted anew at the posterior's centre, where that is worth its cost."""

from __future__ import annotations

import copy
from dataclasses import dataclass

from torch import Tensor

from pyro_hamflow.marginal.mending import enough_particles, fit_at
from pyro_hamflow.marginal.scrutiny import look
from pyro_hamflow.marginal.settle import seconds_to_move, wanted_variance
from pyro_hamflow.marginal.structure import Structure
from pyro_hamflow.marginal.tails import tail
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments

_FAR = 2.0  # the variance with one particle, from which on a closer proposal is tried
_WORTH = 0.5  # of the time or variance as it was: what a new fit may leave at most


def refit_at(
    marginal: TunedEstimator,
    centre: dict[str, Tensor],
    draws: list[dict[str, Tensor]],
    data: Arguments,
    *,
    beyond: bool = False,
    moves: bool = True,
) -> TunedEstimator | None:
    """A copy of a marginal model, fitted at the posterior's centre, if it is worth having.

    Of proposals that follow the parameters more closely that one is taken by which chains take the
    least time.

    Arguments:
        marginal: The model.
        centre: Constrained parameter values at the middle of the draws.
        draws: Some draws.
        data: What the model is called with.
        beyond: Whether these are places where chains hardly go, which all count; else the middle
            one of the draws does.
        moves: Whether the noise moves together with the parameters.

    Returns:
        The copy, with as many particles as make the variance small enough where none were given, or
        as before beyond the chains; none if its estimates vary about as much as before.
    """
    plan = marginal.plan(*data.args, **data.kwargs)  # a look at the model, which is run for it
    count = max(layout.num_particles for layout in plan.layouts.values())
    other = marginal.refined(count, "iid")
    other.num_particles, other.points = marginal.num_particles, marginal.points

    wanted = wanted_variance(marginal.proposal, moves=moves)
    places = _Places(draws, data, plan.structure, count, wanted, beyond)
    with other.hold(plan.structure):
        before = places.variances(marginal)
        best = places.fitted(other, centre)
        closer, farthest = other.proposal.closer(), max(best.variances)
        while closer is not None and farthest > _FAR:
            candidate = copy.copy(best.model)
            candidate.take(closer, best.model.settled_particles)
            best = min(best, places.fitted(candidate, centre), key=lambda fit: fit.seconds)
            closer = candidate.proposal.closer()
        if beyond:
            return best.model if best.seconds < _WORTH * places.seconds(marginal, before) else None
    particles = best.model.settled_particles or count
    gain = best.variances[0] / particles < _WORTH * before[0] / count
    return best.model if gain else None


@dataclass(frozen=True)
class _Fit:
    """A model whose proposal has been fitted, and what was found of it."""

    model: TunedEstimator
    variances: list[float]  # of the log estimate with one particle, in the places that count
    seconds: float  # to move, in units of their own


@dataclass(frozen=True)
class _Places:
    """Where models are compared, by how long chains take to move there."""

    draws: list[dict[str, Tensor]]
    data: Arguments
    structure: Structure
    num_particles: int  # of a model that settles on no number
    wanted: float  # the variance of an estimate that does well
    are_beyond: bool  # all count then, else the middle one

    def variances(self, model: TunedEstimator) -> list[float]:
        found = sorted(
            max(look(model, draw, self.data).variance(1), tail(model, [draw], self.data))
            for draw in self.draws
        )
        return found if self.are_beyond else [found[len(found) // 2]]

    def seconds(self, model: TunedEstimator, variances: list[float]) -> float:
        enough = (model.settled_particles or self.num_particles) * self.wanted
        with model.hold(self.structure):
            return seconds_to_move(model, self.draws[0], [v / enough for v in variances], self.data)

    def fitted(self, model: TunedEstimator, centre: dict[str, Tensor]) -> _Fit:
        """Fits a model, which takes as many particles as make the variance small enough."""
        fit_at(model, centre, self.data)
        found = self.variances(model)
        if model.num_particles is None and not self.are_beyond:
            # Those of the prior hardly count, and with one of the proposal's alone the logarithm
            # varies more than errors of many tell.
            layouts = model.plan(*self.data.args, **self.data.kwargs).layouts.values()
            least = 0 if model.proposal.fades else max(len(layout.strata) for layout in layouts)
            model.settle(enough_particles(least, found[0] / self.wanted))
        return _Fit(model, found, self.seconds(model, found))
