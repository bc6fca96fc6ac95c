"""Training a learned energy on energies and gradients of the true one."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_hamflow.checks import between, whole
from pyro_hamflow.dynamics.energies import PotentialNetwork

BLOCK, HELD_OUT = 16, 10  # neighbours, which are alike; one such block of so many is held out
_CHECK = 50
_BATCH = 256


class Points(NamedTuple):
    """What is known of the true energy, in the order in which it was found.

    Attributes:
        position: Of shape ``(points, dimension)``.
        value: The energies, of shape ``(points,)``.
        gradient: Their gradients, of shape ``(points, dimension)``.
        context: What was held there, of shape ``(points, context_dimension)``.
    """

    position: Tensor
    value: Tensor
    gradient: Tensor
    context: Tensor

    def pick(self, index: Tensor) -> Points:
        """Some of the points."""
        return Points(*(part[index] for part in self))

    def whitened(self, network: PotentialNetwork) -> Points:
        """The same in a network's whitened coordinates, energies about zero."""
        position, slope = network.whitened(self.position), self.gradient @ network.root
        return Points(position, self.value - self.value.mean(), slope, self.context)


class Trajectories(NamedTuple):
    """Stretches of true leapfrog trajectories.

    Attributes:
        position: Of shape ``(stretches, steps + 1, dimension)``.
        step_size: Of shape ``(stretches,)``.
        inverse_mass: Of shape ``(stretches, dimension, dimension)``.
    """

    position: Tensor
    step_size: Tensor
    inverse_mass: Tensor

    def pick(self, index: Tensor) -> Trajectories:
        """Some of the stretches."""
        return Trajectories(*(part[index] for part in self))

    def whitened(self, network: PotentialNetwork) -> Trajectories:
        """The same in a network's whitened coordinates."""
        back = network.inverse_root
        return Trajectories(
            network.whitened(self.position), self.step_size, back @ self.inverse_mass @ back.mT
        )


Loss = Callable[[PotentialNetwork, Any], Tensor]


@dataclass(frozen=True)
class GradientMatching:
    """The mean squared error of the gradient in whitened coordinates, and that of the energy.

    Where the true gradient is many times what is usual, as where chains came from, errors count
    for less. An energy's constant does not count.

    Arguments:
        energy_weight: Of the energy's squared error.

    Example:
        >>> network = PotentialNetwork(2)
        >>> z = torch.randn(100, 2)
        >>> points = Points(z, 0.5 * z.square().sum(-1), z, z[:, :0])
        >>> bool(GradientMatching()(network, points) < 0.1)
        True
    """

    energy_weight: float = 1.0

    def __post_init__(self) -> None:
        between("energy_weight", self.energy_weight, 0.0, math.inf, ends="low")

    def __call__(self, network: PotentialNetwork, points: Points) -> Tensor:
        value, slope = network.of_whitened(network.whitened(points.position), points.context)
        true = points.gradient @ network.root
        size = true.square().sum(-1)
        weight = 1.0 / (1.0 + size / (4.0 * size.median() + network.dimension))
        weight = weight / weight.mean()
        loss = (weight[:, None] * (slope - true).square()).mean()
        if self.energy_weight:
            error = value - points.value
            error = error - (weight * error).mean()
            loss = loss + self.energy_weight * (weight * error.square()).mean()
        return loss


@dataclass(frozen=True)
class TrajectoryMatching:
    r"""The mean squared distance between true trajectories and those of the network.

    Both begin with the same two points; from there the network's follow
    :math:`z_{n+1} = 2 z_n - z_{n-1} - h^2 M^{-1} \nabla V(z_n)`, the leapfrog steps with momenta
    left out. Positions and their differences, the momenta, are compared in whitened coordinates.

    Arguments:
        num_steps: How many steps a trajectory has, 2 or more.
    """

    num_steps: int = 5

    def __post_init__(self) -> None:
        whole("num_steps", self.num_steps, 2)

    def __call__(self, network: PotentialNetwork, trajectories: Trajectories) -> Tensor:
        true, size, mass = trajectories
        before, here = true[:, 0], true[:, 1]
        scale = size[:, None]
        loss = true.new_zeros(())
        for n in range(2, true.shape[1]):
            slope = network.value_and_gradient(here)[1]
            kick = scale.square() * (slope[:, None] @ mass)[:, 0]
            before, here = here, 2.0 * here - before - kick
            miss = (here - true[:, n]) @ network.inverse_root.mT
            change = here - before - true[:, n] + true[:, n - 1]
            spin = change @ network.inverse_root.mT / scale
            loss = loss + (miss.square() + spin.square()).mean()
        return loss / (true.shape[1] - 2)


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
