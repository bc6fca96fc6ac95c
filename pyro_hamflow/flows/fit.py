"""Training of flows and guides: one loop for all."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from pyro_hamflow.checks import positive, whole
from pyro_hamflow.flows.guide import AutoNeuralHamiltonianFlow
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.losses import Loss, Objective, ReverseKL
from pyro_hamflow.model.potential import Potential

_WINDOWS = 40  # over how many parts of the training losses are averaged and compared


@dataclass(frozen=True)
class Fit:
    """How a training went.

    Attributes:
        losses: The loss of each step, NaN where it was skipped.
        best_step: After which step the state that was kept was reached.
        best_loss: The mean loss of the window of steps that ended there.
        num_skipped: How many steps were skipped, since loss or gradient was no finite number.
        stopped_early: Whether it ended before all steps were taken, for want of progress.
        seconds: How long it took.
    """

    losses: Tensor
    best_step: int
    best_loss: float
    num_skipped: int
    stopped_early: bool
    seconds: float

    def __repr__(self) -> str:
        return (
            f"Fit(best_loss={self.best_loss:.4f} at step {self.best_step} of {len(self.losses)}, "
            f"num_skipped={self.num_skipped}, stopped_early={self.stopped_early}, "
            f"seconds={self.seconds:.1f})"
        )


def fit_guide(
    model: Callable[..., Any],
    guide: AutoNeuralHamiltonianFlow,
    *args: Any,
    loss: Loss = ReverseKL(),  # noqa: B008  # frozen
    num_steps: int = 2000,
    num_particles: int = 64,
    learning_rate: float = 5e-3,
    patience: float = 0.5,
    seed: int | None = None,
    jit_compile: bool = False,
    disable_progbar: bool = False,
    **kwargs: Any,
) -> Fit:
    """Trains a guide by Adam, its learning rate falling to nothing along a cosine.

    The model is captured once, its gradients are those of the samplers, so that a step costs little
    more than the flow. Parameters of the model's own (``pyro.param``) stay as they are, and data
    must not be subsampled: for both use :class:`pyro.infer.SVI`.

    Arguments:
        model: The Pyro model.
        guide: The guide, changed in place.
        args: The model's arguments.
        loss: What to minimise: :class:`ReverseKL`, hot first or not, or :class:`ForwardKL`.
        num_steps: How many steps at most.
        num_particles: From how many draws the loss of each step is estimated.
        learning_rate: The first learning rate.
        patience: Which share of all steps may pass without progress before training stops.
        seed: Makes a training repeat itself; torch's current random state is used if not given.
        jit_compile: Whether to compile the model's gradient to machine code.
        disable_progbar: Whether to show no progress bar; nor is it shown where ``CI`` is set.
        kwargs: The model's keyword arguments.

    Returns:
        How it went. The guide is left in the best state that it had.

    Raises:
        TypeError: If the guide is of another kind.
        ValueError: If a number lies outside its range, or the model has one of the faults that
            :class:`~pyro_hamflow.model.potential.Potential` lists.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> guide = AutoNeuralHamiltonianFlow(model, hidden=(8, 8))
        >>> fit = fit_guide(model, guide, torch.ones(3), num_steps=50, disable_progbar=True)
        >>> fit.num_skipped
        0
    """
    if not isinstance(guide, AutoNeuralHamiltonianFlow):
        raise TypeError(
            f"`guide` is a {type(guide).__name__}: expected an AutoNeuralHamiltonianFlow; other "
            "guides train with pyro.infer.SVI"
        )
    whole("num_particles", num_particles, 1)
    if seed is not None:
        torch.manual_seed(seed)
    potential = Potential(model, args, kwargs, separate_noise=True, compile_graphs=jit_compile)
    guide.prepare(*args, **kwargs)
    objective = Objective(guide, potential, num_particles)
    return train(
        guide,
        lambda progress: loss(objective, progress),
        settled=loss.settled,
        num_steps=num_steps,
        learning_rate=learning_rate,
        patience=patience,
        disable_progbar=disable_progbar,
    )


def fit_flow(
    flow: NeuralHamiltonianFlow,
    samples: Tensor,
    *,
    num_steps: int = 2000,
    batch_size: int = 512,
    learning_rate: float = 2e-3,
    patience: float = 0.5,
    seed: int | None = None,
    disable_progbar: bool = False,
) -> Fit:
    r"""Fits a flow to samples, by the bound of their log density.

    Arguments:
        flow: The flow, changed in place.
        samples: Of shape ``(*, dimension)``.
        num_steps: How many steps at most.
        batch_size: How many samples, picked at random, make the loss of each step.
        learning_rate: The first learning rate of Adam.
        patience: As in :func:`fit_guide`.
        seed: As in :func:`fit_guide`.
        disable_progbar: As in :func:`fit_guide`.

    Returns:
        How it went. The flow is left in the best state that it had.

    Raises:
        ValueError: If the samples are of another dimension or not finite, or a number lies outside
            its range.

    References:
        | Fixed-kinetic Neural Hamiltonian Flows (Souveton et al., 2023), equation 4
        | https://hal.science/hal-03976501

    Example:
        >>> flow = NeuralHamiltonianFlow(2, hidden=(8, 8))
        >>> fit_flow(flow, torch.randn(100, 2), num_steps=50, disable_progbar=True).num_skipped
        0
    """
    whole("batch_size", batch_size, 1)
    if samples.shape[-1:] != (flow.dimension,) or not samples.numel():
        raise ValueError(
            f"`samples` have shape {tuple(samples.shape)}: expected (*, {flow.dimension})"
        )
    if not bool(samples.isfinite().all()):
        raise ValueError("`samples` are not all finite: expected numbers")
    samples = samples.reshape(-1, flow.dimension)
    if seed is not None:
        torch.manual_seed(seed)

    def loss(progress: float) -> Tensor:
        picked = torch.randint(len(samples), (batch_size,), device=samples.device)
        return -flow.log_ratio(samples[picked]).mean()

    return train(
        flow,
        loss,
        settled=lambda progress: True,
        num_steps=num_steps,
        learning_rate=learning_rate,
        patience=patience,
        disable_progbar=disable_progbar,
    )


def train(
    module: nn.Module,
    loss: Callable[[float], Tensor],
    *,
    settled: Callable[[float], bool],
    num_steps: int,
    learning_rate: float,
    patience: float,
    disable_progbar: bool,
) -> Fit:
    """Minimises a loss, keeps the best state, skips steps that are no numbers, stops when done.

    Arguments:
        module: Whose parameters to change.
        loss: From the share of the steps that are done to the loss.
        settled: Whether losses at that share can be compared with later ones.
        num_steps: How many steps at most.
        learning_rate: The first learning rate.
        patience: Which share of all steps may pass without progress.
        disable_progbar: Whether to show no progress bar.
    """
    whole("num_steps", num_steps, 1)
    positive("learning_rate", learning_rate)
    positive("patience", patience, infinite=True)
    began = time.perf_counter()
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, learning_rate, fused=True)
    window = max(1, num_steps // _WINDOWS)
    best, best_step, best_loss = copy.deepcopy(module.state_dict()), 0, math.inf
    losses: list[float] = []
    skipped, stopped = 0, False
    hidden = disable_progbar or "CI" in os.environ
    with tqdm(total=num_steps, disable=hidden, desc="Fit") as bar:
        for step in range(num_steps):
            progress = step / num_steps
            rate = 0.5 * learning_rate * (1.0 + math.cos(math.pi * progress))
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.zero_grad()
            value = loss(progress)
            if bool(value.isfinite()):
                value.backward()
                slopes = [p.grad.flatten() for p in parameters if p.grad is not None]
                good = bool(torch.cat(slopes).isfinite().all())
            else:
                good = False
            if good:
                optimizer.step()
            skipped += not good
            losses.append(float(value.detach()) if good else math.nan)
            bar.update()
            if (step + 1) % window:
                continue
            recent = [number for number in losses[-window:] if not math.isnan(number)]
            mean = sum(recent) / len(recent) if recent else math.inf
            bar.set_postfix(loss=f"{mean:.4f}", skipped=skipped, refresh=False)
            if not settled(progress):
                continue
            if mean < best_loss:
                best, best_step, best_loss = copy.deepcopy(module.state_dict()), step + 1, mean
            elif step + 1 - best_step > patience * num_steps:
                stopped = True
                break
    if math.isfinite(best_loss):
        module.load_state_dict(best)
    elapsed = time.perf_counter() - began
    return Fit(torch.tensor(losses), best_step, best_loss, skipped, stopped, elapsed)
