"""Training a learned energy on energies and gradients of the true one."""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pyro_hamflow.surrogates.losses import GradientMatching, Loss, Points, Trajectories
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

BLOCK, HELD_OUT = 16, 10  # neighbours, which are alike; one such block of so many is held out
_CHECK = 50
_BATCH = 256


@dataclass
class Training:
    """What a training took and reached.

    Attributes:
        budget: The most steps of the optimiser.
        steps: Those that were made.
        points: How many points were known, those held out included.
        seconds: How long it took.
        losses: The training loss at every check.
        held_out: The loss on points held out at every check.
        best: The smallest of these, which is that of the weights kept.
        energy_error: The standard deviation of the energy's error on points held out.
    """

    budget: int
    points: int
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    held_out: list[float] = field(default_factory=list)
    best: float = math.inf
    energy_error: float = math.nan


def fit_energy(
    network: PotentialNetwork,
    points: Points | Trajectories,
    *,
    held_out: Tensor | None = None,
    loss: Loss | None = None,
    steps: int = 2000,
    learning_rate: float = 5e-3,
    patience: int = 10,
) -> Training:
    """Trains a network in place, and leaves it with the weights that were best on points held out.

    A copy of the network in whitened coordinates is trained, in single precision, which is several
    times as fast, and precise enough: a network is off by more than that. Points whose numbers are
    too large for it are left out.

    Arguments:
        network: The energy.
        points: What is known of the true energy: points, or whole trajectories.
        held_out: Which of them are held out; if not given, one block of neighbours, which are
            alike, in ten. A network that is trained again forgets slowly what it knows: what was
            held out once has to be so again, or it would look better than anything new.
        loss: From that copy and points to what is to be made small; gradients and energies are
            matched if not given.
        steps: The most steps of the optimiser.
        learning_rate: Of its first steps; it decays to nothing.
        patience: After how many checks without progress to stop.

    Returns:
        What it took and reached.

    Raises:
        ValueError: If there are fewer points than two blocks, or any that are not finite.
    """
    if not all(bool(part.isfinite().all()) for part in points):
        raise ValueError("some of the points are not finite: expected finite energies, gradients")
    began = time.perf_counter()
    student = copy.deepcopy(network).float().train()
    student.forget_whitening()
    lessons = type(points)(*(part.float() for part in points.whitened(network)))
    moderate = [part.square().flatten(1).sum(-1).isfinite() for part in lessons if part.dim() > 1]
    kept = torch.stack(moderate).all(0)
    points, lessons = points.pick(kept), lessons.pick(kept)
    count = len(points.position)
    if count < 2 * BLOCK:
        raise ValueError(f"there are {count} points: expected {2 * BLOCK} or more to train on")
    measure: Loss = loss or GradientMatching()
    if held_out is None:
        block = torch.arange(count, device=points.position.device) // BLOCK
        out = block % HELD_OUT == min(int(block.max()), HELD_OUT - 1)
    else:
        out = held_out[kept]
    test, known = lessons.pick(out), lessons.pick(~out)
    training = Training(steps, count)
    weights = dict(student.named_parameters())
    best = _copied(weights)
    optimiser = torch.optim.Adam(student.parameters(), learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1))
    size = min(_BATCH, len(known.position))
    order, at, since = torch.randperm(len(known.position)), 0, 0
    for step in range(steps + 1):
        if step % _CHECK == 0 or step == steps:
            with torch.no_grad():
                current = float(measure(student, test))
            training.held_out.append(current)
            since += 1
            if current < training.best:
                training.best, since = current, 0
                best = _copied(weights)
            if since > patience or step == steps:
                break
        if at + size > len(order):
            order, at = torch.randperm(len(order)), 0
        error = measure(student, known.pick(order[at : at + size].to(out.device)))
        at += size
        if not bool(error.isfinite()):
            break  # the best weights so far are kept
        optimiser.zero_grad(set_to_none=True)
        error.backward()
        optimiser.step()
        schedule.step()
        training.steps += 1
        if training.steps % _CHECK == 0:
            training.losses.append(float(error.detach()))
    network.load_state_dict(best, strict=False)
    if isinstance(points, Points):
        training.energy_error = _energy_error(network, points.pick(out))
    training.seconds = time.perf_counter() - began
    return training


def _copied(weights: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
def _energy_error(network: PotentialNetwork, points: Points) -> float:
    return float((network(points.position, points.context) - points.value).std(correction=0))
