r"""A learned energy for all data sets of a model: trained once, followed on each without training.

A parameter drawn from the prior, and data drawn given it, are a draw of the posterior given these
data: simulation supplies exact draws of as many posteriors as are wanted. A network of parameters
and data is fitted to the true gradients there and along short trajectories from there. Given new
data, it is a surrogate like any other: what it has not learned costs acceptance, not exactness.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.dynamics.energies import PotentialNetwork
from pyro_hamflow.dynamics.integrators import leapfrog_step
from pyro_hamflow.dynamics.training import GradientMatching, Points, Training, fit_energy
from pyro_hamflow.model.capture import batch, capture
from pyro_hamflow.model.potential import Potential, with_slopes

Summary = Callable[[Mapping[str, Tensor]], Tensor]
_TOGETHER = 64
_LEAST_RATE = 0.8


def flatten_data(data: Mapping[str, Tensor]) -> Tensor:
    """The observed values in one row, of shape ``(context_dimension,)``."""
    return torch.cat([value.reshape(-1) for value in data.values()])


class AmortizedSurrogate:
    """A learned energy of parameters and data.

    Arguments:
        network: The energy, whose context is a summary of the data.
        summary: From observed values by site to the context.
        training: What its training took and reached.
        n_gradients: True gradients spent on it.
    """

    def __init__(
        self, network: PotentialNetwork, summary: Summary, training: Training, n_gradients: int
    ) -> None:
        self.network = network
        self.summary = summary
        self.training = training
        self.n_gradients = n_gradients

    def at(self, potential: Potential) -> PotentialNetwork:
        """The energy given a potential's data.

        Raises:
            ValueError: If the data have another size than those it was trained on.
        """
        context = self.summary(_observed(potential)).to(potential.example)
        expected = self.network.context_dimension
        if tuple(context.shape) != (expected,):
            raise ValueError(
                f"the summary of the data has shape {tuple(context.shape)}: expected "
                f"({expected},), as in training"
            )
        return self.network.to(potential.example).given(context)


def learn_surrogate(
    model: Callable[..., Any],
    *args: Any,
    num_sets: int = 1000,
    num_steps: int = 8,
    hidden: Sequence[int] = (128, 128),
    training_steps: int = 5000,
    summary: Summary = flatten_data,
    **kwargs: Any,
) -> AmortizedSurrogate:
    """Trains a surrogate on data sets simulated from a model.

    Arguments:
        model: A Pyro model without noise sites, whose observed sites are simulated.
        args: Its arguments; the data among them give the shapes alone.
        num_sets: How many data sets are simulated.
        num_steps: How many leapfrog steps are made along each one's true gradient.
        hidden: The widths of the network's hidden layers.
        training_steps: The most steps of the optimiser.
        summary: From observed values by site to what the network sees of them.
        kwargs: The model's keyword arguments.

    Returns:
        The surrogate, to be passed to a kernel.

    Raises:
        ValueError: If a number is not positive, or the model observes nothing.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> surrogate = learn_surrogate(model, torch.zeros(3), num_sets=64, training_steps=50)
        >>> surrogate.network.sizes["context_dimension"]
        3
    """
    for name, number in (
        ("num_sets", num_sets),
        ("num_steps", num_steps),
        ("training_steps", training_steps),
    ):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"`{name}` is {number!r}: expected a positive integer")
    data = dict(_observed(Potential(model, args, kwargs)))
    if not data:
        raise ValueError("the model observes nothing: expected data to simulate")

    def conditioned(*args: Any, **kwargs: Any) -> Any:
        return poutine.condition(poutine.uncondition(model), data)(*args, **kwargs)

    potential = Potential(conditioned, args, kwargs)
    names = list(data)

    def gradient(position: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        data.update(zip(names, values, strict=True))
        with torch.enable_grad():
            position = position.detach().requires_grad_()
            return with_slopes(potential.value_of_one(position, position[:0]), position)

    groups = -(-num_sets // _TOGETHER)
    sets = [_simulate(model, potential, names, args, kwargs) for _ in range(groups * _TOGETHER)]
    position = torch.stack([z for z, _ in sets])
    values = [torch.stack(part) for part in zip(*(v for _, v in sets), strict=True)]
    first = [part[:_TOGETHER] for part in values]
    kept = dict(data)
    graph = capture(gradient, position[0], *(part[0] for part in values))
    data.update(kept)
    program = batch(graph, position[:_TOGETHER], *first)
    scale = position.std(0)

    def follow(z: Tensor, parts: list[Tensor], size: float) -> tuple[list[Any], Tensor]:
        def gradient_of(z: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            return program(z, *parts)

        found = []
        value, slope = program(z, *parts)
        ones, step = torch.ones_like(scale), size * scale
        r = torch.randn_like(z)
        start = value + 0.5 * r.square().sum(-1)
        found.append((z, value, slope))
        for _ in range(num_steps):
            z, r, value, slope = leapfrog_step(gradient_of, z, r, slope, z[:, :0], ones, step)
            found.append((z, value, slope))
        rate = torch.exp(start - value - 0.5 * r.square().sum(-1)).clamp(max=1.0)
        return found, rate.nan_to_num()

    size, runs = 0.5, 1
    while float(follow(position[:_TOGETHER], first, size)[1].mean()) < _LEAST_RATE and size > 1e-4:
        size, runs = size / 2, runs + 1
    rows: list[tuple[Tensor, ...]] = []
    for start in range(0, len(position), _TOGETHER):
        parts = [part[start : start + _TOGETHER] for part in values]
        rate = size * (0.5 + float(torch.rand(())))
        found, _ = follow(position[start : start + _TOGETHER], parts, rate)
        context = torch.stack(
            [
                summary({name: part[i] for name, part in zip(names, parts, strict=True)})
                for i in range(_TOGETHER)
            ]
        ).to(position)
        rows += [(*point, context) for point in found]
    # Data set by data set, so that what is held out are data sets.
    points = Points(*(torch.stack(part, 1).flatten(0, 1) for part in zip(*rows, strict=True)))
    good = points.value.isfinite() & points.gradient.isfinite().all(-1)
    points = points.pick(good)
    network = PotentialNetwork(
        potential.dimension, hidden=hidden, context_dimension=points.context.shape[1]
    ).to(potential.example)
    network.whiten_by(points.position, points.context)
    training = fit_energy(
        network,
        points,
        loss=GradientMatching(energy_weight=0.0),  # each data set's energy has its own constant
        steps=training_steps,
    )
    count = len(rows) * _TOGETHER + runs * (num_steps + 1) * _TOGETHER
    return AmortizedSurrogate(network, summary, training, count)


def _observed(potential: Potential) -> dict[str, Tensor]:
    """The observed values of a model's run, by site."""
    return {
        name: site["value"]
        for name, site in potential.plain_trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and isinstance(site["value"], Tensor)
        and site["value"].numel() > 0
    }


def _simulate(
    model: Callable[..., Any],
    potential: Potential,
    names: list[str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A position from the prior, and data given it."""
    with torch.no_grad(), poutine.block():
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    position = potential.flatten({s.name: trace.nodes[s.name]["value"] for s in potential.sites})
    return position, tuple(trace.nodes[name]["value"] for name in names)
