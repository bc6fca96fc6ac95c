r"""Flows that carry a population from one temperature to the next.

A flow T takes particles of :math:`\pi_{k-1}` to about where those of :math:`\pi_k` are, and their
weights are multiplied by

.. math:: \frac{\gamma_k(T(x))\, |\det \nabla T(x)|}{\gamma_{k-1}(x)},

which all are alike where T is perfect, and right whatever T is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_hamflow.checks import positive, whole
from pyro_hamflow.flows.near_identity import NearIdentity
from pyro_hamflow.model.tempered import TemperedTarget
from pyro_hamflow.networks.training import CHECK_EVERY, HELD_OUT, PATIENCE, train
from pyro_hamflow.smc.moves import shrinkage_of
from pyro_hamflow.smc.particles import Particles, Rung
from pyro_hamflow.smc.resampling import conditional_size

_JUDGES = 1000  # particles


@dataclass(frozen=True)
class AFT:
    """Annealed flow transport: a flow is trained at each temperature, on the first population.

    Arguments:
        num_layers: How many coupling layers each flow has.
        hidden: The widths of the hidden layers of their networks.
        num_steps: How many steps the training of each takes at most.
        learning_rate: The first learning rate.
        batch_size: How many particles each step sees.

    References:
        | Annealed Flow Transport Monte Carlo (Arbel, Matthews, Doucet, 2021)
        | https://arxiv.org/abs/2102.07501
    """

    num_layers: int = 4
    hidden: tuple[int, ...] = (32, 32)
    num_steps: int = 300
    learning_rate: float = 1e-2
    batch_size: int = 256

    def __post_init__(self) -> None:
        _check(self.num_layers, self.learning_rate)
        whole("num_steps", self.num_steps, 1)
        whole("batch_size", self.batch_size, 1)


@dataclass(frozen=True)
class CRAFT:
    """Continual repeated annealed flow transport: all flows are trained over many passes.

    Each pass is a new population, on which every flow takes a step; so a flow is trained on where
    those before it lead to.

    Arguments:
        num_layers: How many coupling layers each flow has.
        hidden: The widths of the hidden layers of their networks.
        num_passes: How many passes there are.
        learning_rate: The first learning rate.
        num_particles: How many particles make a pass.

    References:
        | Continual Repeated Annealed Flow Transport Monte Carlo (Matthews et al., 2022)
        | https://arxiv.org/abs/2201.13117
    """

    num_layers: int = 4
    hidden: tuple[int, ...] = (32, 32)
    num_passes: int = 200
    learning_rate: float = 1e-2
    num_particles: int = 256

    def __post_init__(self) -> None:
        _check(self.num_layers, self.learning_rate)
        whole("num_passes", self.num_passes, 1)
        whole("num_particles", self.num_particles, 2)


def _check(num_layers: int, learning_rate: float) -> None:
    whole("num_layers", num_layers, 0)
    positive("learning_rate", learning_rate)


def flow_at(settings: AFT | CRAFT, particles: Particles) -> NearIdentity:
    """A flow that is the identity yet, in coordinates where a population is about standard.

    Arguments:
        settings: What it is made of.
        particles: The population.
    """
    good = particles.position.isfinite().all(-1)
    position, share = particles.position[good].double(), particles.weights[good]
    loc = share @ position / share.sum()
    centred = position - loc
    covariance = (share[:, None] * centred).mT @ centred / share.sum()
    scale = covariance.diagonal().sqrt()
    few = shrinkage_of(len(loc)) / len(position)  # correlations are drawn towards none
    identity = torch.eye(len(loc)).to(covariance)
    correlation = (covariance / torch.outer(scale, scale) + few * identity) / (1.0 + few)
    root = scale[:, None] * torch.linalg.cholesky(correlation)
    return NearIdentity(loc, root, settings.num_layers, settings.hidden)


def transport_loss(
    flow: NearIdentity, target: TemperedTarget, position: Tensor, noise: Tensor
) -> Tensor:
    """How far moved particles are from the target, each: their energy less the growth of volume.

    The mean over particles is the divergence of where they are moved to from the target, but for a
    constant. Particles whose energy is not finite do not count.
    """
    moved, growth = flow(position)
    program = target.graph("gradient", len(position))
    value, gradient = program(moved.detach().to(position), noise)
    good = value.isfinite() & gradient.isfinite().all(-1)
    pull = torch.where(good[:, None], gradient, 0.0).to(moved)
    along = (pull * moved).sum(-1)
    return torch.where(good, value.to(moved) + along - along.detach() - growth, 0.0)


def flow_to(settings: AFT, inverse_temperature: float, particles: Particles) -> NearIdentity | None:
    """A flow trained to carry a population to a temperature; none if that does not pay.

    Arguments:
        settings: How.
        inverse_temperature: The temperature.
        particles: The population, at the temperature before.
    """
    flow = flow_at(settings, particles)
    position, noise, weights = particles.position, particles.noise, particles.weights
    held_out = torch.arange(len(position), device=position.device) % HELD_OUT == 0
    judges = weights[held_out] / weights[held_out].sum()

    def loss(progress: float) -> Tensor:
        picked = torch.multinomial(weights[~held_out], settings.batch_size, replacement=True)
        batch = position[~held_out][picked], noise[~held_out][picked]
        return transport_loss(flow, particles.target, *batch).mean()

    @torch.no_grad()
    def measure(progress: float, mean: float) -> float:
        judged = position[held_out], noise[held_out]
        return float(judges @ transport_loss(flow, particles.target, *judged))

    with _at(particles.target, inverse_temperature):
        train(
            flow,
            loss,
            measure=measure,
            num_steps=settings.num_steps,
            learning_rate=settings.learning_rate,
            check_every=CHECK_EVERY,
            patience=PATIENCE * settings.num_steps,
        )
    flow.requires_grad_(False)
    return flow if _pays(flow, inverse_temperature, particles, held_out) else None


def _pays(
    flow: NearIdentity, inverse_temperature: float, particles: Particles, chosen: Tensor
) -> bool:
    """Whether weights at another temperature are worth more by a flow than by staying.

    A flow that is trained on energies may leave out where particles are few, for small losses and
    large weights.

    Arguments:
        flow: The flow.
        inverse_temperature: The temperature.
        particles: The population, at the temperature before.
        chosen: The particles that judge, a boolean of shape ``(replicates * particles,)``.
    """
    log_weights = particles.all_log_weights.flatten()[chosen]
    increments = [particles.reach(inverse_temperature, way)[0] for way in (flow, None)]
    there, staying = (conditional_size(log_weights, i.flatten()[chosen]) for i in increments)
    return there > staying


def train_in_passes(
    settings: CRAFT, target: TemperedTarget, schedule: Sequence[Rung], num_moves: int
) -> list[Rung]:
    """Trains the flows of a schedule, each by one step in each of many passes.

    Arguments:
        settings: How.
        target: The path.
        schedule: With untrained flows, which are changed in place.
        num_moves: How often particles move at each temperature.

    Returns:
        The schedule without those flows that do not pay, in a pass that nothing is trained on.
    """
    flows = [rung.flow for rung in schedule if rung.flow is not None]
    optimizers = [torch.optim.Adam(flow.parameters(), settings.learning_rate) for flow in flows]
    for number in range(settings.num_passes):
        particles = Particles(target, (1, settings.num_particles))
        share = 0.5 * (1.0 + math.cos(math.pi * number / settings.num_passes))
        for rung, flow, optimizer in zip(schedule, flows, optimizers, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = share * settings.learning_rate
            with _at(target, rung.inverse_temperature):
                each = transport_loss(flow, target, particles.position, particles.noise)
            optimizer.zero_grad()
            (particles.weights @ each).backward()
            gradients = [part.grad for part in flow.parameters() if part.grad is not None]
            if all(bool(gradient.isfinite().all()) for gradient in gradients):
                optimizer.step()
            particles.pass_on(rung, num_moves)
    particles = Particles(target, (1, _JUDGES))
    everyone = torch.ones(_JUDGES, dtype=torch.bool)
    chosen = []
    for rung, flow in zip(schedule, flows, strict=True):
        flow.requires_grad_(False)
        pays = _pays(flow, rung.inverse_temperature, particles, everyone)
        chosen.append(rung if pays else replace(rung, flow=None))
        particles.pass_on(chosen[-1], num_moves)
    return chosen


@contextmanager
def _at(target: TemperedTarget, inverse_temperature: float) -> Iterator[None]:
    """The path at another temperature for a while."""
    before = target.inverse_temperature.clone()
    target.inverse_temperature.fill_(inverse_temperature)
    try:
        yield
    finally:
        target.inverse_temperature.copy_(before)
