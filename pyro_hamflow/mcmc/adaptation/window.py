"""Warm-up: what is learned before draws are kept, pooled over all chains.

Step size by dual averaging on the mean acceptance probability of all chains; inverse mass from the
covariance of their positions, in windows of doubling length. When warm-up ends, both are frozen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.dynamics.kinetic import GaussianKinetic
from pyro_hamflow.mcmc.adaptation.metric import Metric
from pyro_hamflow.mcmc.adaptation.watch import Watch
from pyro_hamflow.mcmc.transitions.base import Info, State, Tuning

_BEFORE, _FIRST_WINDOW = 5, 5  # iterations; windows double, so that these matter little
_GAIN, _LARGEST_STEP = 20.0, 1e3  # the latter where a density is so flat that all is accepted


class DualAveraging:
    """Finds the step size at which the acceptance probability has a given mean.

    It seeks with large moves about ten times the first size, which brings it far soon and leaves it
    swinging: its average is then too small, the more so the more acceptance varies.

    Arguments:
        step_size: Where to start.
        target: The mean acceptance probability wanted.
        gently: Whether it seeks where it starts, with moves a third as large.

    References:
        | The No-U-Turn Sampler (Hoffman and Gelman, 2014), section 3.2
        | https://arxiv.org/abs/1111.4246
    """

    def __init__(self, step_size: float, target: float, *, gently: bool = False) -> None:
        self.target = target
        self._centre = math.log(step_size if gently else 10.0 * step_size)
        self._gain = _GAIN / 3.0 if gently else _GAIN
        self._count = 0
        self._gap = 0.0
        self._average = 0.0
        self.step_size = step_size

    def update(self, acceptance_rate: float) -> None:
        """Takes in the acceptance probability that the current step size led to."""
        self._count += 1
        weight = 1.0 / (self._count + 10.0)
        self._gap = (1 - weight) * self._gap + weight * (self.target - acceptance_rate)
        log_size = self._centre - self._gain * math.sqrt(self._count) * self._gap
        decay = self._count**-0.75
        self._average = decay * log_size + (1 - decay) * self._average
        self.step_size = min(math.exp(log_size), _LARGEST_STEP)

    def final(self) -> float:
        """The averaged step size, to be used from now on."""
        return math.exp(self._average) if self._count else self.step_size


def mass_windows(warmup_steps: int) -> list[int]:
    """The iterations at whose end the mass is updated: windows of doubling length.

    The first iterations, which find a first step size, and the last 10 per cent (50 iterations, if
    there are enough), which settle the step size, lie outside the windows.

    Example:
        >>> mass_windows(500)
        [10, 20, 40, 80, 160, 450]
    """
    stop = warmup_steps - max(warmup_steps // 10, min(50, warmup_steps // 5))
    return _windows(_BEFORE, stop)


def _windows(start: int, stop: int) -> list[int]:
    """The ends of windows of doubling length between two iterations."""
    ends, length = [], _FIRST_WINDOW
    while start + length <= stop:
        # The last window takes what is left when its successor would not fit.
        end = start + length if start + 3 * length <= stop else stop
        ends.append(end)
        start, length = end, 2 * length
    return ends


@dataclass
class Findings:
    """What warm-ups have found, and share.

    Attributes:
        num_chains: Of how many chains.
        metric: What a window's positions and gradients tell; none if none is over.
        watch: What the last window shows; none if it is not over.
        log_step_size: The logarithm of the step size, averaged.
        may_go_on: Whether there may be more iterations, as far as it is worth it.
    """

    num_chains: int
    metric: Metric | None
    watch: Watch | None
    log_step_size: float
    may_go_on: bool

    @staticmethod
    def joined(parts: Sequence[Findings]) -> Findings:
        """What all of them have found together, at the same iteration."""
        chains = sum(part.num_chains for part in parts)
        metrics = [part.metric for part in parts if part.metric is not None]
        watches = [part.watch for part in parts if part.watch is not None]
        return Findings(
            chains,
            Metric.joined(metrics) if metrics else None,
            Watch.joined(watches) if watches else None,
            sum(part.num_chains * part.log_step_size for part in parts) / chains,
            all(part.may_go_on for part in parts),
        )


class WarmUp:
    """Tunes step size and mass over the warm-up iterations, and says when it has done so.

    Where it may go on for longer than ``warmup_steps``, the last window decides: unless chains
    agree by then, and nothing that is tuned is still on its way, another follows, which makes the
    warm-up twice as long.

    Arguments:
        step_size: The first step size.
        kinetic: The first kinetic energy.
        warmup_steps: How many iterations there will be, at least.
        target: The mean acceptance probability wanted.
        adapt_step_size: Whether to tune the step size.
        adapt_mass: Whether to tune the mass.
        most_steps: How many iterations there may be, as many as must be if not given.
        shaped: Gives a covariance the structure that the inverse mass is to have.
        pools: Whether it waits, at the end of each window and of the warm-up, for what others have
            found.
        single_steps: Whether moves are single steps, whose acceptance varies more than the mean of
            a trajectory: once the mass is found, their size is sought gently.

    Attributes:
        tuning: What is found so far.
        waits: Whether it does so now.
        warmup_steps: How many iterations there will be, as far as is known.
        doubts: Why the last window did not convince, in words; empty if it did.
        has_gone_on: Whether there were more iterations than at least.
        may_go_on: Whether there may be, as far as it is worth it.
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
        most_steps: int | None = None,
        shaped: Callable[[Tensor], Tensor] | None = None,
        pools: bool = False,
        single_steps: bool = False,
    ) -> None:
        self.tuning = Tuning(step_size, kinetic)
        self.warmup_steps = warmup_steps
        self.target = target
        self.adapt_step_size = adapt_step_size
        self.adapt_mass = adapt_mass
        self._shaped = shaped
        self.pools = pools
        self._single_steps = single_steps
        self.waits = False
        self.doubts: list[str] = []
        self.has_gone_on = False
        self.may_go_on = True
        self._most_steps = max(warmup_steps, most_steps or 0)
        self._windows = mass_windows(warmup_steps)
        self._opening = int(0.15 * warmup_steps)
        self._averaging = DualAveraging(step_size, target)
        self._metric = self._new_metric()
        self._done = 0
        self._watch = self._new_watch()

    @property
    def finished(self) -> bool:
        return self._done >= self.warmup_steps and not self.waits

    @property
    def remaining(self) -> int:
        """How many iterations are to come, as far as is known."""
        return max(0, self.warmup_steps - self._done)

    @property
    def opening(self) -> bool:
        """Whether the chains are still on their way to the typical set."""
        return self._done < self._opening

    def restart(self, step_size: float) -> None:
        """Begins the search for the step size anew, from a reasonable one."""
        gently = self._single_steps and not self._windows
        self._averaging = DualAveraging(step_size, self.target, gently=gently)
        self.tuning = self.tuning._replace(step_size=step_size)

    def update(self, state: State, info: Info) -> bool:
        """Takes in the outcome of one iteration; says whether the mass has changed."""
        self._done += 1
        if self.adapt_step_size:
            self._set_step_scale(info.acceptance_rate)
            self._averaging.update(float(info.acceptance_rate.mean()))
        if self.adapt_mass and self._windows:
            dimension = state.position.shape[1]
            self._metric.update(state.position, state.gradient[:, :dimension])
        if self._watch is not None:
            self._watch.update(state.position, info, self.tuning.step_size)
        at_end = self._done == self.warmup_steps
        self.waits = self.pools and (self._at_end_of_window or at_end)
        return not self.waits and self._conclude(self._metric, self._watch, self._averaging.final())

    def found(self, num_chains: int) -> Findings:
        """What is to be joined with what others have found, while it waits for them."""
        at_end = self._done == self.warmup_steps
        return Findings(
            num_chains,
            self._metric if self._at_end_of_window else None,
            self._watch if at_end else None,
            math.log(self._averaging.final()),
            self.may_go_on,
        )

    def take_in(self, found: Findings) -> bool:
        """Goes on with what all have found together; says whether the mass has changed."""
        self.waits, self.may_go_on = False, found.may_go_on
        size = math.exp(found.log_step_size)
        return self._conclude(found.metric or self._metric, found.watch or self._watch, size)

    @property
    def _at_end_of_window(self) -> bool:
        return self.adapt_mass and self._done in self._windows[:1]

    def _conclude(self, metric: Metric, watch: Watch | None, final_size: float) -> bool:
        """What follows from an iteration; says whether the mass has changed."""
        changed = self._at_end_of_window
        if changed:
            self._windows.pop(0)
            self._set_mass(metric)
        if watch is not None and self.finished:
            self._judge(watch)
        if self.adapt_step_size:
            size = final_size if self.finished else self._averaging.step_size
            self.tuning = self.tuning._replace(step_size=size)
        return changed

    def _set_mass(self, metric: Metric) -> None:
        """Makes a mass of a window's positions and gradients."""
        if metric.count > 2:
            inverse_mass = metric.inverse_mass(self.tuning.kinetic.inverse_mass)
            if self._shaped is not None:
                inverse_mass = self._shaped(inverse_mass)
            self.tuning = self.tuning._replace(kinetic=GaussianKinetic(inverse_mass))
        self._metric = self._new_metric()

    def _judge(self, watch: Watch) -> None:
        """Goes on for another window unless the last one shows convergence."""
        self.doubts = watch.doubts()
        if not self.doubts or not self.may_go_on or self.warmup_steps >= self._most_steps:
            return
        self.has_gone_on = True
        start, self.warmup_steps = self._done, min(2 * self._done, self._most_steps)
        length = self.warmup_steps - start
        stop = self.warmup_steps - max(length // 10, min(50, length // 5))
        self._windows = [start + (stop - start) // 3, stop]
        self._watch = self._new_watch()

    def _new_watch(self) -> Watch | None:
        """A watch over the mass's last window and the rest; none if no more may follow."""
        if self._most_steps == self.warmup_steps and not self._done:
            return None
        start = self._windows[-2] if len(self._windows) > 1 else self._done
        return Watch(start - self._done, self.warmup_steps - start, joins=self.pools)

    def _set_step_scale(self, acceptance_rate: Tensor) -> None:
        """Shortens the steps of chains that would not move, as far out, until the opening ends.

        The step that suits most chains may be too long for one that started badly, which would stay
        where it is for ever. Where chains do not agree, steps differ again in the windows to come.
        """
        scale = None
        if self.opening or (self.has_gone_on and self._windows):
            old = self.tuning.step_scale
            old = torch.ones_like(acceptance_rate) if old is None else old
            scale = (old * torch.exp(acceptance_rate - self.target)).clamp(max=1.0)
        self.tuning = self.tuning._replace(step_scale=scale)

    def _new_metric(self) -> Metric:
        inverse_mass = self.tuning.kinetic.inverse_mass
        dense = inverse_mass.dim() == 2
        return Metric(len(inverse_mass), dense=dense, device=inverse_mass.device)
