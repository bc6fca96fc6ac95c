"""Warm-up: what is learned before draws are kept, pooled over all chains.

Step size by dual averaging on the mean acceptance probability of all chains; inverse mass from the
covariance of their positions, in windows of doubling length. When warm-up ends, both are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.transition import Tuning

_FIRST_WINDOW = 20
_LARGEST_STEP = 1e3
_FEWEST_PER_DIMENSION = 3


class DualAveraging:
    """Finds the step size at which the acceptance probability has a given mean.

    Arguments:
        step_size: Where to start.
        target: The mean acceptance probability wanted.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014), section 3.2
        | https://arxiv.org/abs/1111.4246
    """

    def __init__(self, step_size: float, target: float) -> None:
        self.target = target
        self._centre = math.log(10.0 * step_size)
        self._count = 0
        self._gap = 0.0
        self._average = 0.0
        self.step_size = step_size

    def update(self, acceptance_rate: float) -> None:
        """Takes in the acceptance probability that the current step size led to."""
        self._count += 1
        weight = 1.0 / (self._count + 10.0)
        self._gap = (1 - weight) * self._gap + weight * (self.target - acceptance_rate)
        log_size = self._centre - math.sqrt(self._count) / 0.05 * self._gap
        decay = self._count**-0.75
        self._average = decay * log_size + (1 - decay) * self._average
        self.step_size = min(math.exp(log_size), _LARGEST_STEP)

    def final(self) -> float:
        """The averaged step size, to be used from now on."""
        return math.exp(self._average) if self._count else self.step_size


class Covariance:
    """A running covariance of the positions of all chains, each about its own mean.

    Chains that have not met yet, as in the modes or the labellings of a mixture, are far from each
    other; what a step has to suit is the spread around each.

    Arguments:
        dimension: Of the positions.
        dense: Whether to keep the whole matrix, or its diagonal alone.
    """

    def __init__(self, dimension: int, *, dense: bool) -> None:
        self.dense = dense
        self._mean = torch.zeros(1, dimension, dtype=torch.float64)
        self._sum = torch.zeros((dimension, dimension) if dense else (dimension,)).double()
        self._counts = torch.zeros(1, 1, dtype=torch.float64)

    @property
    def count(self) -> int:
        """How many positions were taken in, less one for each chain's mean."""
        return int((self._counts - 1.0).clamp(min=0.0).sum())

    def update(self, position: Tensor) -> None:
        """Takes in positions, of shape ``(chains, dimension)``."""
        batch = position.double().cpu()
        finite = batch.isfinite().all(-1, keepdim=True)
        old, self._counts = self._counts, self._counts + finite
        shift = torch.where(finite, batch - self._mean, 0.0)
        self._mean = self._mean + shift / self._counts.clamp(min=1.0)
        weighted = shift * old / self._counts.clamp(min=1.0)
        self._sum += weighted.mT @ shift if self.dense else (weighted * shift).sum(0)

    def inverse_mass(self) -> Tensor:
        """The covariance, shrunk a little towards a small multiple of the identity.

        A whole matrix from few positions has directions without any spread, in which no step can be
        made: below three positions for each dimension its diagonal alone is trusted.
        """
        count = self.count
        covariance = self._sum / max(count, 1)
        share, floor = count / (count + 5.0), 1e-3 * 5.0 / (count + 5.0)
        if not self.dense:
            return share * covariance + floor
        if count < _FEWEST_PER_DIMENSION * len(self._sum):
            covariance = torch.diag(covariance.diag())
        return share * covariance + floor * torch.eye(len(self._sum)).double()


def mass_windows(warmup_steps: int) -> list[int]:
    """The iterations at whose end the mass is updated: windows of doubling length.

    The first 15 per cent of the iterations, which find the typical set, and the last 10 per cent
    (50 iterations, if there are enough), which settle the step size, lie outside the windows.

    Example:
        >>> mass_windows(500)
        [95, 135, 215, 450]
    """
    if warmup_steps < _FIRST_WINDOW:
        return []
    start = int(0.15 * warmup_steps)
    stop = warmup_steps - max(warmup_steps // 10, min(50, warmup_steps // 5))
    ends, length = [], _FIRST_WINDOW
    while start + length <= stop:
        # The last window takes what is left when its successor would not fit.
        end = start + length if start + 3 * length <= stop else stop
        ends.append(end)
        start, length = end, 2 * length
    return ends


class WarmUp:
    """Tunes step size and mass over the warm-up iterations.

    Arguments:
        step_size: The first step size.
        kinetic: The first kinetic energy.
        warmup_steps: How many iterations there will be.
        target: The mean acceptance probability wanted.
        adapt_step_size: Whether to tune the step size.
        adapt_mass: Whether to tune the mass.
        shaped: Gives a covariance the structure that the inverse mass is to have.
    """

    def __init__(
        self,
        step_size: float,
        kinetic: GaussianKinetic,
        warmup_steps: int,
        *,
        target: float,
        adapt_step_size: bool,
        adapt_mass: bool,
        shaped: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.tuning = Tuning(step_size, kinetic)
        self.warmup_steps = warmup_steps
        self.target = target
        self.adapt_step_size = adapt_step_size
        self.adapt_mass = adapt_mass
        self._shaped = shaped
        self._windows = mass_windows(warmup_steps)
        self._opening = int(0.15 * warmup_steps)
        self._averaging = DualAveraging(step_size, target)
        self._covariance = self._new_covariance()
        self._done = 0

    @property
    def finished(self) -> bool:
        return self._done >= self.warmup_steps

    @property
    def opening(self) -> bool:
        """Whether the chains are still on their way to the typical set."""
        return self._done < self._opening

    def restart(self, step_size: float) -> None:
        """Begins the search for the step size anew, from a reasonable one."""
        self._averaging = DualAveraging(step_size, self.target)
        self.tuning = self.tuning._replace(step_size=step_size)

    def update(self, position: Tensor, acceptance_rate: Tensor) -> bool:
        """Takes in the outcome of one iteration; says whether the mass has changed."""
        self._done += 1
        if self.adapt_step_size:
            self._set_pace(acceptance_rate)
            self._averaging.update(float(acceptance_rate.mean()))
            size = self._averaging.final() if self.finished else self._averaging.step_size
            self.tuning = self.tuning._replace(step_size=size)
        if not self.adapt_mass or not self._windows:
            return False
        if self._done > self._opening:
            self._covariance.update(position)
        if self._done != self._windows[0]:
            return False
        self._windows.pop(0)
        if self._covariance.count > 2:
            old = self.tuning.kinetic.inverse_mass
            inverse_mass = self._covariance.inverse_mass().to(old)
            if self._shaped is not None:
                inverse_mass = self._shaped(inverse_mass)
            self.tuning = self.tuning._replace(kinetic=GaussianKinetic(inverse_mass))
        self._covariance = self._new_covariance()
        return True

    def _set_pace(self, acceptance_rate: Tensor) -> None:
        """Slows chains down that would not move, as out in the tails, until the opening is over.

        The step that suits most chains may be too long for one that started badly: tuned on the
        mean of all, it would stay where it is for ever.
        """
        pace = None
        if self.opening:
            old = self.tuning.pace
            old = torch.ones_like(acceptance_rate) if old is None else old
            pace = (old * torch.exp(acceptance_rate - self.target)).clamp(max=1.0)
        self.tuning = self.tuning._replace(pace=pace)

    def _new_covariance(self) -> Covariance:
        inverse_mass = self.tuning.kinetic.inverse_mass
        return Covariance(len(inverse_mass), dense=inverse_mass.dim() == 2)
