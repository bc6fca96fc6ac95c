"""Training: one loop for all that is learned."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pyro_hamflow.progress import Bar

BATCH = 256  # points in a step
CHECK_EVERY = 25  # steps
PATIENCE = 0.5  # of all steps, without progress, after which a training ends
HELD_OUT = 5  # one of so many draws judges what the others are fitted to


@dataclass(frozen=True, eq=False)
class Training:
    """How a training went.

    Attributes:
        budget: The most steps that it could take.
        losses: The loss of each step that it took, NaN where it was skipped.
        checks: What was measured at each check, the first before any step; NaN where nothing was.
        best_step: After which step the state that was kept was reached.
        best_loss: What was measured there, the least of all.
        num_skipped: How many steps were skipped, since loss or gradient was no finite number.
        stopped_early: Whether it ended before all steps were taken, for want of progress.
        seconds: How long it took.
    """

    budget: int
    losses: Tensor = field(repr=False)
    checks: list[float] = field(repr=False)
    best_step: int
    best_loss: float
    num_skipped: int
    stopped_early: bool
    seconds: float


class Trainable(Protocol):
    """What can be trained; any torch module is."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """What the optimiser changes."""

    def state_dict(self) -> dict[str, Any]:
        """The present state."""

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Goes back to a state that was kept."""


def train(
    module: Trainable,
    loss: Callable[[float], Tensor],
    *,
    measure: Callable[[float, float], float | None],
    num_steps: int,
    learning_rate: float,
    check_every: int,
    patience: float,
    bar: Bar | None = None,
) -> Training:
    """Minimises a loss by Adam, the learning rate falling to nothing along a cosine.

    The state that measured best is the one it ends with, also where it is interrupted. Steps whose
    loss or gradient is no finite number are skipped.

    Arguments:
        module: What to train, in place.
        loss: From the share of the steps that are done to the loss.
        measure: What tells states apart, the less the better: from the share of the steps at the
            last one, and the mean loss since the last check, infinite if there is none. ``None``
            where it cannot be compared with what comes later.
        num_steps: How many steps at most.
        learning_rate: The first learning rate.
        check_every: After how many steps to measure.
        patience: How many steps may pass without progress before it stops.
        bar: A progress bar that is told of each step.
    """
    began = time.perf_counter()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate, fused=True)
    best, best_step, best_loss = copy.deepcopy(module.state_dict()), 0, math.inf
    losses: list[float] = []
    checks: list[float] = []
    progress, skipped, stopped = 0.0, 0, False
    try:
        for step in range(num_steps + 1):
            if step % check_every == 0:
                recent = [number for number in losses[-check_every:] if not math.isnan(number)]
                mean = sum(recent) / len(recent) if recent else math.inf
                measured = measure(progress, mean)
                checks.append(math.nan if measured is None else measured)
                if bar is not None:
                    bar.set_postfix(loss=f"{mean:.4f}", skipped=skipped, refresh=False)
                if measured is not None and measured < best_loss:
                    best, best_step, best_loss = copy.deepcopy(module.state_dict()), step, measured
                elif measured is not None and step - best_step > patience:
                    stopped = True
            if stopped or step == num_steps:
                break
            progress = step / num_steps
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * learning_rate * (1.0 + math.cos(math.pi * progress))
            optimizer.zero_grad()
            value = loss(progress)
            good = bool(value.isfinite())
            if good:
                value.backward()
                gradients = [p.grad.flatten() for p in parameters if p.grad is not None]
                good = bool(torch.cat(gradients).isfinite().all())
            if good:
                optimizer.step()
            skipped += not good
            losses.append(float(value.detach()) if good else math.nan)
            if bar is not None:
                bar.update()
    finally:  # an interruption keeps the best state, too
        if math.isfinite(best_loss):
            module.load_state_dict(best)
    seconds = time.perf_counter() - began
    return Training(
        num_steps, torch.tensor(losses), checks, best_step, best_loss, skipped, stopped, seconds
    )
