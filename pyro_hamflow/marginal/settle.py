"""How much an estimate varies, and how many particles that takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.work import numbers_made

WANTED_VARIANCE = 1.0  # of the log estimate
_RAREST = 1e-6  # acceptance rate: what is never accepted is no worse
_REPLICATES = 100  # estimates: their variance is then known to a seventh


def repeated_estimates(
    marginal: TunedEstimator,
    parameters: dict[str, Tensor],
    num_replicates: int,
    data: Arguments,
) -> Tensor:
    """Log estimates of all elements from fresh noise, of shape ``(replicates, elements)``.

    Arguments:
        marginal: A marginal model whose proposal has been fitted.
        parameters: Constrained values of the parameters.
        num_replicates: How many estimates to make.
        data: What the model is called with.
    """
    plan = marginal.plan(*data.args, **data.kwargs)
    elements = []
    for group in plan.structure.groups:
        layout = plan.layouts[group.name]
        draws = []
        for _ in range(num_replicates):
            u = torch.randn(
                layout.noise_shape(group), dtype=layout.example.dtype, device=layout.example.device
            )
            with torch.no_grad(), marginal.hold(plan.structure):
                estimate = marginal.estimate(group, u, parameters, *data.args, **data.kwargs)
            draws.append(estimate.log_weights.logsumexp(0).flatten())
        elements.append(torch.stack(draws).double())
    return torch.cat(elements, -1)


def settle_particles(marginal: TunedEstimator, data: Arguments) -> None:
    """Finds the fewest particles that are enough at the pilot, doubling from two.

    No more than the proposal's own default are tried: beyond, more particles cost more than the
    noise that they take away. Those of a path share all that its proposal takes, and as many are
    taken as let chains move in the least time.

    Arguments:
        marginal: A model whose proposal has been fitted.
        data: What the model is called with.
    """
    pilot = [marginal.prepared.pilot]
    with random_state_kept():
        torch.manual_seed(0)
        if marginal.proposal.fades:
            _settle_by_time(marginal, pilot[0], data)
        elif not settle_below(marginal, pilot, WANTED_VARIANCE, _REPLICATES, data):
            marginal.settle(None)


def _settle_by_time(marginal: TunedEstimator, pilot: dict[str, Tensor], data: Arguments) -> None:
    structure = marginal.plan(*data.args, **data.kwargs).structure
    most, tried = marginal.proposal.enough_particles, []
    for count in (2**i for i in range(most.bit_length())):
        marginal.settle(count)
        found = repeated_estimates(marginal, pilot, _REPLICATES, data).sum(-1)
        variance = float(found.var())
        with marginal.hold(structure):
            tried.append((seconds_to_move(marginal, pilot, [variance], data), count))
        if variance <= WANTED_VARIANCE:
            break
    marginal.settle(min(tried)[1])


def seconds_to_move(
    marginal: TunedEstimator,
    draw: dict[str, Tensor],
    variances: list[float],
    data: Arguments,
) -> float:
    """About how long chains take to move, in units of their own.

    That is the work of an estimate, times how often fresh noise is proposed until it is accepted as
    a whole.

    Arguments:
        marginal: A model whose proposal has been fitted, and whose structure is held.
        draw: Constrained parameter values.
        variances: Those of the log estimate in some places.
        data: What the model is called with.
    """
    work = numbers_made(lambda: repeated_estimates(marginal, draw, 1, data))
    accepted = (math.erfc(0.5 * math.sqrt(variance)) for variance in variances)
    return work * sum(1.0 / max(rate, _RAREST) for rate in accepted) / len(variances)


def settle_below(
    marginal: TunedEstimator,
    draws: list[dict[str, Tensor]],
    variance: float,
    num_replicates: int,
    data: Arguments,
) -> bool:
    """Takes the fewest particles, doubling from two, for which estimates vary less than so much.

    Arguments:
        marginal: A model whose proposal has been fitted; changed in place.
        draws: Constrained parameter values, over which the median counts.
        variance: That of the log estimate which is small enough.
        num_replicates: How many estimates it is measured by.
        data: What the model is called with.

    Returns:
        Whether fewer than it had are enough.
    """
    layouts = marginal.plan(*data.args, **data.kwargs).layouts.values()
    most = max(layout.num_particles for layout in layouts)
    count = max(2 if marginal.proposal.is_defended else 1, *(len(p.strata) for p in layouts))
    while count < most:
        marginal.settle(count)
        estimates = [
            repeated_estimates(marginal, draw, num_replicates, data).sum(-1) for draw in draws
        ]
        if float(torch.stack(estimates).var(-1).median()) <= variance:
            return True
        count *= 2
    return False
