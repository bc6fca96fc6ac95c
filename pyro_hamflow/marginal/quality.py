"""What a likelihood estimate is worth: its noise, and the number of particles it suggests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from pyro_hamflow.marginal.marginalize import MarginalModel
from pyro_hamflow.marginal.scrutiny import look
from pyro_hamflow.marginal.settle import WANTED_VARIANCE, repeated_estimates
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.process import undisturbed


class EstimatorQuality(NamedTuple):
    """The noise of a log-likelihood estimate at one parameter value.

    Attributes:
        standard_deviation: Of the log estimate.
        worst_element: The largest standard deviation of a single element's log estimate.
        num_particles: The number of particles it was found for.
        suggested_num_particles: About how many would bring the variance to one, where both ways of
            pseudo-marginal HMC move freely.
        max_pareto_k: The shape of the tail of the particles' weights, of the elements that vary
            most. Above 0.7 the standard deviations cannot be relied on: the largest weights may be
            missing.
    """

    standard_deviation: float
    worst_element: float
    num_particles: int
    suggested_num_particles: int
    max_pareto_k: float


@undisturbed()
def estimator_quality(
    marginal: MarginalModel,
    parameters: Mapping[str, Tensor],
    *args: Any,
    num_replicates: int = 100,
    **kwargs: Any,
) -> EstimatorQuality:
    """Measures the noise of a marginal model's estimate by repeating it.

    The variance falls as 1/N for independent points and pairs, and about as 1/N squared for a
    lattice, which is what the suggested number of particles goes by. It differs over the posterior:
    look at more than one draw.

    Arguments:
        marginal: A model from :func:`~pyro_hamflow.marginalize`.
        parameters: Constrained values of the sites that are not integrated out.
        args: The model's arguments.
        num_replicates: How many independent estimates to make.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: If a parameter's value is missing, or there are fewer than two replicates.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     with pyro.plate("group", len(y)):
        ...         x = pyro.sample("x", dist.Normal(mean, 1.0))
        ...         pyro.sample("y", dist.Poisson(x.exp()), obs=y)
        >>> marginal = marginalize(model, ["x"], num_particles=8, proposal="prior")
        >>> parameters = {"mean": torch.tensor(0.0)}
        >>> quality = estimator_quality(marginal, parameters, torch.tensor([2.0, 0.0, 1.0]))
        >>> 0.2 < quality.standard_deviation < 1.0
        True
    """
    if num_replicates < 2:
        raise ValueError(f"`num_replicates` is {num_replicates}: expected 2 or more")
    plan = marginal.plan(*args, **kwargs)
    for name in plan.structure.parameters:
        if name not in parameters and name not in plan.structure.placeholders:
            raise ValueError(f"`parameters` lacks a value for site '{name}'")
    if marginal.proposal.needs_fit:
        marginal.prepare(args, kwargs)
        plan = marginal.plan(*args, **kwargs)
    data = Arguments(args, kwargs)
    joined = repeated_estimates(marginal, dict(parameters), num_replicates, data)
    deviation = float(joined.sum(-1).std())
    ratio = deviation**2 / WANTED_VARIANCE
    factor = math.sqrt(ratio) if marginal.points == "rqmc" else ratio
    least = max(len(plan.layouts[group.name].strata) for group in plan.structure.groups)
    count = max(plan.layouts[group.name].num_particles for group in plan.structure.groups)
    suggested = max(least, math.ceil(count * factor)) if math.isfinite(ratio) else least
    tail = look(marginal, dict(parameters), data).max_pareto_k
    return EstimatorQuality(deviation, float(joined.std(0).max()), count, suggested, tail)
