"""Where weights reach further than estimates show, and what is said of it."""

from __future__ import annotations

from torch import Tensor

from pyro_hamflow.marginal.tuned_estimator import TunedEstimator
from pyro_hamflow.model.kinds import Arguments
from pyro_hamflow.process import random_state_kept

# As a variance of logarithms. For classes along a line by a Gaussian process of 40 places: 5 to 8
# where chains stayed for hundreds of draws, .03 to .2 after a fit that lets none stay. For
# stochastic volatility it is .04 at most.
NARROW = 0.5
_LONG = 2.0  # the same, at which one of the posterior's paths is proposed seven times to move once


def tail(marginal: TunedEstimator, draws: list[dict[str, Tensor]], data: Arguments) -> float:
    """How far weights reach beyond what estimates show, at the worst of some parameter values."""
    if not (draws and marginal.proposal.fades):
        return 0.0
    with random_state_kept():
        plan = marginal.plan(*data.args, **data.kwargs)
        return max(marginal.proposal.tail(plan, draw) for draw in draws)


def told_of_tails(
    marginal: TunedEstimator, draws: list[dict[str, Tensor]], data: Arguments
) -> str | None:
    """What is said where a chain may stay at one path for long; mostly nothing."""
    if tail(marginal, draws, data) <= _LONG:
        return None
    return (
        f"the Gaussian proposal of {list(marginal.sites)} is far too narrow for some paths of the "
        "posterior: a chain that comes to one of them stays there for many draws, which estimates "
        f"of small variance do not show; `NUTS(whiten(model, {list(marginal.sites)}))` has no "
        "weights that it could stay for, or take more particles."
    )
