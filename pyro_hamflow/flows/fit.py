"""Fits of guides to models, and of flows to samples."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from pyro.infer.autoguide import AutoGuide, AutoLaplaceApproximation
from torch import Tensor

from pyro_hamflow.checks import positive, whole
from pyro_hamflow.flows.hamiltonian_flow import NeuralHamiltonianFlow
from pyro_hamflow.flows.losses import GuideLoss, Objective, ReverseKL
from pyro_hamflow.flows.lost_modes import describe_lost_modes
from pyro_hamflow.flows.pyro_guides import ModeSearch, as_guide
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.networks.training import Trainable, Training, train
from pyro_hamflow.process import undisturbed
from pyro_hamflow.programs.captured import keep_with
from pyro_hamflow.progress import progress

_WINDOWS = 40  # parts of a training, whose mean losses are compared


class TrainableGuide(DensityGuide, Trainable, Protocol):
    """A guide that :func:`fit_guide` trains, and that corrections take as well.

    It has the methods of a torch module, ``parameters``, ``state_dict`` and ``load_state_dict``,
    and three more:

    - ``prepare(*args, **kwargs)`` sees the model's arguments, after which its parameters are there.
    - ``draw(num_samples)`` gives positions of all parameters on the real line, of shape
      ``(num_samples, dimension)``, and the log density of each, of shape ``(num_samples,)``.
      Gradients flow through both. Where it draws something more beside, such as momenta, see
      :class:`~pyro_hamflow.model.guides.Guide`.
    - ``log_ratio(position)`` gives the log density of positions ``(positions, dimension)``, of
      shape ``(positions,)``, through which gradients flow too.
    """


def fit_guide(
    model: Model,
    guide: TrainableGuide | AutoGuide,
    *args: Any,
    loss: GuideLoss = ReverseKL(),  # noqa: B008  # frozen
    num_steps: int = 2000,
    num_particles: int = 64,
    learning_rate: float = 5e-3,
    patience: float = 0.5,
    seed: int | None = None,
    jit_compile: bool = False,
    disable_progbar: bool = False,
    **kwargs: Any,
) -> Training:
    """Trains a guide by Adam, its learning rate falling to nothing along a cosine.

    The model is captured once, its gradients are those of the samplers, so that a step costs little
    more than the flow. Parameters of the model's own (``pyro.param``) stay as they are, and data
    must not be subsampled: for both use :class:`pyro.infer.SVI`. Where descents from elsewhere find
    modes that the guide lacks, it warns in the end: with how much of the posterior, and what to do.

    Arguments:
        model: The Pyro model.
        guide: An :class:`~pyro_hamflow.AutoFlow` or
            :class:`~pyro_hamflow.AutoNeuralHamiltonianFlow`, one of Pyro's own guides whose density
            is known, or anything that fills the protocol :class:`TrainableGuide`; changed in place.
            Of an ``AutoLaplaceApproximation`` the mode is found.
        args: The model's arguments.
        loss: What to minimise: :class:`ReverseKL`, hot first or not, or :class:`ForwardKL`.
        num_steps: How many steps at most.
        num_particles: From how many draws the loss of each step is estimated.
        learning_rate: The first learning rate.
        patience: Which share of all steps may pass without progress before training stops.
        seed: Makes a training repeat itself, and leaves random states as they were; torch's current
            one is used, and goes on, if not given.
        jit_compile: Whether to compile the model's gradient to machine code.
        disable_progbar: Whether to show no progress: else it is a bar, or where nobody watches (in
            a file, or where ``CI`` is set) a line each half minute.
        kwargs: The model's keyword arguments.

    Returns:
        How it went. The guide is left in the best state that it had.

    Raises:
        TypeError: If the guide lacks a method of the protocol, or has nothing to train so, as an
            ``AutoGuideList`` with an ``AutoLaplaceApproximation``, whose mode
            :class:`pyro.infer.SVI` finds.
        ValueError: If a number lies outside its range, the guide's draws are of other shapes than
            the protocol's, what an ``AutoLaplaceApproximation`` has come to is no mode, or it is to
            be trained by :class:`ForwardKL`, or the model has one of the faults that
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
    owner, guide = guide, as_guide("guide", guide, TrainableGuide)
    if isinstance(owner, AutoLaplaceApproximation):
        guide = ModeSearch(owner)
    whole("num_particles", num_particles, 1)
    with undisturbed(seed):
        potential = Potential(model, args, kwargs, separate_noise=True, compile_graphs=jit_compile)
        keep_with(owner, potential.programs.captured)  # for those who correct it
        guide.prepare(*args, **kwargs)
        if not any(part.requires_grad for part in guide.parameters()):
            raise TypeError(f"`guide` {owner!r} has nothing to train: expected parameters")
        objective = Objective(guide, potential, num_particles)
        training = _train(
            guide,
            lambda progress: loss(objective, progress),
            settled=loss.settled,
            num_steps=num_steps,
            learning_rate=learning_rate,
            patience=patience,
            disable_progbar=disable_progbar,
        )
        lost = describe_lost_modes(guide, potential)
    if lost is not None:
        warnings.warn(lost, stacklevel=2)
    return training


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
) -> Training:
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

    def loss(progress: float) -> Tensor:
        picked = torch.randint(len(samples), (batch_size,), device=samples.device)
        return -flow.log_ratio(samples[picked]).mean()

    with undisturbed(seed):
        return _train(
            flow,
            loss,
            settled=lambda progress: True,
            num_steps=num_steps,
            learning_rate=learning_rate,
            patience=patience,
            disable_progbar=disable_progbar,
        )


def _train(
    module: Trainable,
    loss: Callable[[float], Tensor],
    *,
    settled: Callable[[float], bool],
    num_steps: int,
    learning_rate: float,
    patience: float,
    disable_progbar: bool,
) -> Training:
    """Minimises a loss; the state kept is the one before which the mean loss was least."""
    whole("num_steps", num_steps, 1)
    positive("learning_rate", learning_rate)
    positive("patience", patience, infinite=True)
    with progress(num_steps, "Fit", hidden=disable_progbar) as bar:
        return train(
            module,
            loss,
            measure=lambda progress, mean: mean if settled(progress) else None,
            num_steps=num_steps,
            learning_rate=learning_rate,
            check_every=max(1, num_steps // _WINDOWS),
            patience=patience * num_steps,
            bar=bar,
        )
