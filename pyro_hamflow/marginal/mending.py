"""What is done about an estimator that misses something, or varies too much.

A single Gaussian for each element may give way to several, and these to the prior; more particles
may be taken.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from pyro_hamflow.marginal.proposals.mixture import MixtureProposal
from pyro_hamflow.marginal.proposals.prior import PriorProposal
from pyro_hamflow.marginal.scrutiny import find_misses, look, misses
from pyro_hamflow.marginal.settle import WANTED_VARIANCE, settle_below
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments

_PRIOR_VARIANCE = 4.0  # of estimates from the prior: twice as many particles gain little then
_FEWEST, _MOST = 32, 512  # particles from the prior
_ENOUGH = 16  # particles of a Gaussian proposal: beyond, they cost more than they gain
_REPLICATES = 32  # estimates, for each of a few draws
_EASED = 0.5  # of the wanted variance, at which fewer particles do: away from where more are taken


def mend_proposal(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    data: Arguments,
) -> str | None:
    """Fits several modes where a proposal that was left to be chosen misses something.

    Where these miss something, too, particles come from the prior.

    Arguments and results are those of :func:`misses`.
    """
    if not marginal.proposal.is_comparable:
        return marginal.proposal.remark
    if not marginal.may_choose_proposal:
        return misses(marginal, draws, data)
    said, variance = find_misses(marginal, draws, data)
    if said is None:
        return None
    several = copy.copy(marginal)
    fit_modes(several, draws[0], data)
    if find_misses(several, draws, data)[0] is None:
        own = max(look(several, draw, data).variance(1) for draw in draws)
        if own < variance:
            least = max(
                len(p.strata) for p in several.plan(*data.args, **data.kwargs).layouts.values()
            )
            marginal.take_over(several.prepared)
            marginal.take(several.proposal, enough_particles(2 * least, own))
            return (
                f"{said}; Gaussians about several modes of each are fitted instead, with "
                f"{marginal.settled_particles} particles."
            )
    marginal.take(PriorProposal(), number_from_prior(variance))
    return f"{said}; particles come from the prior instead, {marginal.settled_particles} of each."


def more_particles(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    data: Arguments,
) -> TunedEstimator | None:
    """A copy of a marginal model with more particles; none if it has enough.

    Arguments:
        marginal: The model, whose proposal is one that takes no fit, as the prior is.
        draws: Constrained parameter values.
        data: What the model is called with.
    """
    layouts = marginal.plan(*data.args, **data.kwargs).layouts.values()
    found = sorted(look(marginal, draw, data).variance(1) for draw in draws)
    wanted = number_from_prior(found[len(found) // 2])
    if marginal.num_particles or wanted <= max(layout.num_particles for layout in layouts):
        return None
    other = copy.copy(marginal)
    other.take(other.proposal, wanted)
    return other


def fewer_particles(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    data: Arguments,
) -> TunedEstimator | None:
    """A copy of a marginal model with as few particles as do; none if it has no more than that.

    What warm-up wanted while chains were far away is too much where they arrive.

    Arguments:
        marginal: The model, whose proposal has been fitted.
        draws: Constrained parameter values.
        data: What the model is called with.
    """
    if marginal.num_particles:
        return None
    marginal.plan(*data.args, **data.kwargs)  # a look at the model, which a copy shares
    other = copy.copy(marginal)
    enough = settle_below(other, draws, _EASED * WANTED_VARIANCE, _REPLICATES, data)
    return other if enough else None


def number_from_prior(variance: float) -> int:
    """How many particles bring an estimate's variance from that with one to where it does well."""
    wanted = 2 ** math.ceil(math.log2(max(1.0, variance / _PRIOR_VARIANCE)))
    return min(max(wanted, _FEWEST), _MOST)


def enough_particles(least: int, ratio: float) -> int:
    """How many particles of Gaussian proposals make the variance small enough.

    Arguments:
        least: Particles that hardly count.
        ratio: The variance with one particle, over what is small enough.
    """
    wanted = 2 ** math.ceil(math.log2(max(1.0, least + ratio)))
    return min(wanted, max(_ENOUGH, 2 ** math.ceil(math.log2(max(1, least)))))


def fit_modes(
    marginal: TunedEstimator,
    pilot: dict[str, Tensor],
    data: Arguments,
) -> None:
    """Fits a Gaussian proposal of several modes, with the tails that serve each element best.

    Arguments:
        marginal: A marginal model.
        pilot: Constrained parameter values.
        data: What the model is called with.
    """
    marginal.plan(
        *data.args, **data.kwargs
    )  # a look at the model, before which nothing can be taken
    marginal.take(MixtureProposal(num_particles=marginal.num_particles))
    fit_at(marginal, pilot, data)


def fit_at(
    marginal: TunedEstimator,
    pilot: dict[str, Tensor],
    data: Arguments,
) -> None:
    """Fits a proposal, with the tails that serve each element best where it has a choice.

    Arguments are those of :func:`fit_modes`.
    """
    tails = marginal.proposal.tails
    if tails:
        marginal.take(marginal.proposal)  # with as many particles as the modes need that are found
    marginal.fit(*data.args, pilot=pilot, **data.kwargs)
    if not tails:
        return
    plan = marginal.plan(*data.args, **data.kwargs)
    groups = plan.structure.groups
    sizes = [group.shape.numel() for group in groups]
    errors = []
    for tail in tails:
        one = plan.layouts[groups[0].name].example.new_tensor(tail)
        marginal.stretch({group.name: one.expand(group.shape) for group in groups})
        errors.append(look(marginal, pilot, data).error.nan_to_num(nan=math.inf))
    best = one.new_tensor(tails)[torch.stack(errors).argmin(0)]
    parts = zip(groups, best.split(sizes), strict=True)
    marginal.stretch({group.name: part.reshape(group.shape) for group, part in parts})
