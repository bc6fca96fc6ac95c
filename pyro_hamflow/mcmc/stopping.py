"""When a run has drawn enough: what is known of it on its way, and what to stop by."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

import numpy as np
import torch

from pyro_hamflow.checks import positive
from pyro_hamflow.mcmc.diagnosis import judged, worst
from pyro_hamflow.mcmc.draws import Draws
from pyro_hamflow.mcmc.messages import FEWEST

GROWTH = 1.1  # of the draws, after which they are judged anew: a run is looked at 80 times in 10^5


class RunSoFar:
    """What is known of a run while it draws.

    Diagnostics are ArviZ's, of parameters on the real line, as at the end of a run. They are made
    when they are asked for, and anew once there are a tenth more draws; with fewer than 50 draws of
    each chain, no draw is effective and R-hat is infinite.

    Arguments:
        began: When the run began, by :func:`time.monotonic`.

    Attributes:
        num_draws: How many draws each chain has made.
    """

    def __init__(self, began: float) -> None:
        self._began = began
        self.num_draws = 0
        self._draws: Callable[[], Draws] = partial(Draws, torch.empty(0, 0, 0), {}, {})
        self._judged = 0
        self._min_ess, self._max_rhat = 0.0, np.inf

    def update(self, num_draws: int, draws: Callable[[], Draws]) -> None:
        """Takes in new draws: how many there are, and what gives them all."""
        self.num_draws, self._draws = num_draws, draws

    @property
    def seconds(self) -> float:
        """How long the run has taken, its warm-up included."""
        return time.monotonic() - self._began

    @property
    def min_ess(self) -> float:
        """The smallest effective sample size in the bulk, of all chains together."""
        self._judge()
        return self._min_ess

    @property
    def max_rhat(self) -> float:
        """The largest R-hat."""
        self._judge()
        return self._max_rhat

    def _judge(self) -> None:
        if self.num_draws < max(FEWEST, GROWTH * self._judged):
            return
        self._judged = self.num_draws
        draws = self._draws()
        if not draws.extent[2]:
            return
        found = judged(draws, worst(draws))
        self._min_ess = float(np.nan_to_num(found["ess_bulk"], nan=0.0).min())
        self._max_rhat = float(found["rhat"].max())


StopWhen: TypeAlias = Callable[[RunSoFar], bool]


def ess_above(least: float) -> StopWhen:
    """Stops a run once every parameter has so many effective draws, in the bulk.

    A run that stops by its own draws stops a little more often where they look better than they
    are; of some hundreds of effective draws that is next to nothing.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> mcmc = MCMC(HMC(model), 5000, num_chains=4, seed=0, stop_when=ess_above(400))
        >>> mcmc.run()
        >>> mcmc.draws.position.shape[1] < 1000
        True
    """
    positive("least", least)
    return partial(_has_ess, least)


def rhat_below(most: float) -> StopWhen:
    """Stops a run once R-hat of every parameter is below a bound, such as 1.01."""
    positive("most", most)
    return partial(_has_rhat, most)


def time_over(seconds: float) -> StopWhen:
    """Stops a run that has taken so long, its warm-up included, which it does not cut short."""
    positive("seconds", seconds)
    return partial(_has_taken, seconds)


def _has_ess(least: float, run: RunSoFar) -> bool:
    return run.min_ess >= least


def _has_rhat(most: float, run: RunSoFar) -> bool:
    return run.max_rhat < most


def _has_taken(seconds: float, run: RunSoFar) -> bool:
    return run.seconds >= seconds
