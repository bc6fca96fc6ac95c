"""Fits of learned energies to energies and gradients of the true one."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_hamflow.networks.training import BATCH, Training, train
from pyro_hamflow.progress import Bar
from pyro_hamflow.surrogates.losses import EnergyLoss, GradientMatching, Points, TrajectorySegments
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

BLOCK, HELD_OUT = 16, 10  # neighbours, which are alike; one such block of so many is held out
_CHECK = 50  # steps, about


@dataclass(frozen=True, eq=False)
class EnergyTraining(Training):
    """How the training of an energy went; checks measure its loss on points held out.

    Attributes:
        points: How many points were known, those held out included.
        energy_error: The standard deviation of the energy's error on points held out.
    """

    points: int
    energy_error: float


def fit_energy(
    network: PotentialNetwork,
    points: Points | TrajectorySegments,
    *,
    held_out: Tensor | None = None,
    loss: EnergyLoss | None = None,
    num_steps: int = 2000,
    learning_rate: float = 5e-3,
    patience: int = 10,
    bar: Bar | None = None,
) -> EnergyTraining:
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
        num_steps: The most steps of the optimiser.
        learning_rate: Of its first steps; it decays to nothing.
        patience: After how many checks without progress to stop.
        bar: A progress bar that is told of each step.

    Returns:
        What it took and reached.

    Raises:
        ValueError: If there are fewer points than two blocks, or any that are not finite.
    """
    if not all(bool(part.isfinite().all()) for part in points):
        raise ValueError("some of the points are not finite: expected finite energies, gradients")
    trained = copy.deepcopy(network).float().train()
    trained.forget_whitening()
    examples = type(points)(*(part.float() for part in points.whitened(network)))
    moderate = [part.square().flatten(1).sum(-1).isfinite() for part in examples if part.dim() > 1]
    kept = torch.stack(moderate).all(0)
    points, examples = points.pick(kept), examples.pick(kept)
    count = len(points.position)
    if count < 2 * BLOCK:
        raise ValueError(f"there are {count} points: expected {2 * BLOCK} or more to train on")
    if held_out is None:
        block = torch.arange(count, device=points.position.device) // BLOCK
        out = block % HELD_OUT == min(int(block.max()), HELD_OUT - 1)
    else:
        out = held_out[kept]
    test, known = examples.pick(out), examples.pick(~out)
    error: EnergyLoss = GradientMatching() if loss is None else loss
    batches = _batches(len(known.position))

    @torch.no_grad()
    def measure(progress: float, mean: float) -> float:
        return float(error(trained, test))

    check_every = max(1, num_steps // max(1, round(num_steps / _CHECK)))
    training = train(
        trained,
        lambda progress: error(trained, known.pick(next(batches).to(out.device))),
        measure=measure,
        num_steps=num_steps,
        learning_rate=learning_rate,
        check_every=check_every,
        patience=patience * check_every,
        bar=bar,
    )
    network.load_state_dict(dict(trained.named_parameters()), strict=False)
    found = _energy_error(network, points.pick(out)) if isinstance(points, Points) else math.nan
    return EnergyTraining(**vars(training), points=count, energy_error=found)


def _batches(count: int) -> Iterator[Tensor]:
    """Indices of points in random order, again and again."""
    size = min(BATCH, count)
    while True:
        order = torch.randperm(count)
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


@torch.no_grad()
def _energy_error(network: PotentialNetwork, points: Points) -> float:
    return float((network(points.position, points.context) - points.value).std(correction=0))
