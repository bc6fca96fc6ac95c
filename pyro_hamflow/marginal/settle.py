"""How much an estimate varies, and how many particles that takes."""

from __future__ import annotations

import math
from contextlib import suppress

import torch
from torch import Tensor

from pyro_hamflow.marginal.proposals.base import Proposal
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.process import random_state_kept
from pyro_hamflow.programs.capture import Program, capture
from pyro_hamflow.programs.validation import no_validation
from pyro_hamflow.programs.work import numbers_made

WANTED_VARIANCE = 1.0  # of the log estimate
# The same of a path, where the noise moves with the parameters. A thousand draws of four chains, of
# 2,000 returns of the S&P, were worth 1,190 to 1,350 at 2.9 (one particle, 90 us a gradient), 1,300
# at 2.4 (two, 120 us) and 1,160 at 1.2 (four, 160 us).
_WANTED_MOVED_VARIANCE = 3.0
_RAREST = 1e-6  # acceptance rate: what is never accepted is no worse
_CAPTURED = 20  # estimates, from which on it takes less time to capture what makes them
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
        layout, draws = plan.layouts[group.name], list[Tensor]()
        example, shape = layout.example, layout.noise_shape(group)

        def one(u: Tensor, group: Group = group) -> Tensor:
            with torch.no_grad(), marginal.hold(plan.structure):
                estimate = marginal.estimate(group, u, parameters, *data.args, **data.kwargs)
            return estimate.log_weights.logsumexp(0).flatten()

        program: Program = one
        if num_replicates >= _CAPTURED:
            with (
                suppress(Exception),
                no_validation(),
            ):  # whatever a model's own code may raise while it is traced
                program = capture(one, example.new_zeros(shape))
        for _ in range(num_replicates):
            u = torch.randn(shape, dtype=example.dtype, device=example.device)
            draws.append(program(u))
        elements.append(torch.stack(draws).double())
    return torch.cat(elements, -1)


def wanted_variance(proposal: Proposal, *, moves: bool) -> float:
    """Which variance of the log estimate is small enough.

    Arguments:
        proposal: Where particles come from.
        moves: Whether the noise moves together with the parameters.
    """
    return _WANTED_MOVED_VARIANCE if moves and proposal.fades else WANTED_VARIANCE


def settle_particles(marginal: TunedEstimator, data: Arguments, *, moves: bool) -> None:
    """Finds the fewest particles that are enough at the pilot, doubling from two, or from one.

    No more than the proposal's own default are tried: beyond, more particles cost more than the
    noise that they take away.

    Arguments:
        marginal: A model whose proposal has been fitted.
        data: What the model is called with.
        moves: Whether the noise is to move together with the parameters.
    """
    wanted = wanted_variance(marginal.proposal, moves=moves)
    pilot = [marginal.prepared.pilot]
    with random_state_kept():
        torch.manual_seed(0)
        if not settle_below(marginal, pilot, wanted, _REPLICATES, data):
            marginal.settle(None)


def seconds_to_move(
    marginal: TunedEstimator,
    draw: dict[str, Tensor],
    variances: list[float],
    data: Arguments,
) -> float:
    """About how long chains take to move, in units of their own.

    That is the work of an estimate, times how often noise is proposed until it is accepted. Noise
    that moves with the parameters bears as much more variance as is wanted of it.

    Arguments:
        marginal: A model whose proposal has been fitted, and whose structure is held.
        draw: Constrained parameter values.
        variances: Those of the log estimate in some places, over what is small enough.
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
