"""How much an estimate varies, and how many particles that takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.marginal.tuned_estimator import TunedEstimator

WANTED_VARIANCE = 1.0  # of the log estimate
_REPLICATES = 100  # estimates: their variance is then known to a seventh


def repeated_estimates(
    marginal: TunedEstimator,
    parameters: dict[str, Tensor],
    num_replicates: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """Log estimates of all elements from fresh noise, of shape ``(replicates, elements)``.

    Arguments:
        marginal: A marginal model whose proposal has been fitted.
        parameters: Constrained values of the parameters.
        num_replicates: How many estimates to make.
        args: The model's arguments.
        kwargs: Its keyword arguments.
    """
    plan = marginal.plan(*args, **kwargs)
    elements = []
    for group in plan.structure.groups:
        layout = plan.layouts[group.name]
        draws = []
        for _ in range(num_replicates):
            u = torch.randn(
                layout.noise_shape(group), dtype=layout.example.dtype, device=layout.example.device
            )
            with torch.no_grad(), marginal.hold(plan.structure):
                estimate = marginal.estimate(group, u, parameters, *args, **kwargs)
            draws.append(estimate.log_weights.logsumexp(0).flatten())
        elements.append(torch.stack(draws).double())
    return torch.cat(elements, -1)


def settle_particles(
    marginal: TunedEstimator, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Finds the fewest particles that are enough at the pilot, doubling from two.

    No more than the proposal's own default are tried: beyond, more particles cost more than the
    noise that they take away.

    Arguments:
        marginal: A model whose proposal has been fitted.
        args: The model's arguments.
        kwargs: The model's keyword arguments.
    """
    layouts = marginal.plan(*args, **kwargs).layouts.values()
    most = max(layout.num_particles for layout in layouts)
    count = max(2, *(len(layout.strata) for layout in layouts))
    pilot = marginal.prepared.pilot
    with torch.random.fork_rng():
        torch.manual_seed(0)
        while count < most:
            marginal.settle(count)
            estimates = repeated_estimates(marginal, pilot, _REPLICATES, args, kwargs).sum(-1)
            if float(estimates.std()) ** 2 <= WANTED_VARIANCE:
                return
            count *= 2
    marginal.settle(None)
