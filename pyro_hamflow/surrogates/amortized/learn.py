"""How a learned energy for all data sets of a model is trained, on data sets simulated from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow.checks import whole
from pyro_hamflow.dynamics.integrators import ValueAndGradients, leapfrog_step
from pyro_hamflow.model.kinds import Model
from pyro_hamflow.networks.conditional_gaussian import ConditionalGaussian, matvec
from pyro_hamflow.process import undisturbed
from pyro_hamflow.progress import Bar, progress
from pyro_hamflow.surrogates.amortized.probes import probe
from pyro_hamflow.surrogates.amortized.simulated import SimulatedSets
from pyro_hamflow.surrogates.amortized.surrogate import AmortizedSurrogate, Summary, flatten_data
from pyro_hamflow.surrogates.fit import fit_energy
from pyro_hamflow.surrogates.learner import FIRST_RATE
from pyro_hamflow.surrogates.losses import GradientMatching, Points
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_LEAST_RATE = 0.9  # of acceptance, at which trajectories hardly leave their energy
_GUESS_RATE = 3e-3  # of learning


@undisturbed()
def learn_surrogate(
    model: Model,
    *args: Any,
    num_sets: int = 4000,
    num_steps: int = 2,
    hidden: Sequence[int] = (128, 128),
    training_steps: int = 3000,
    summary: Summary = flatten_data,
    disable_progbar: bool = False,
    **kwargs: Any,
) -> AmortizedSurrogate:
    """Trains a surrogate on data sets simulated from a model.

    Arguments:
        model: A Pyro model without noise sites, whose observed sites are simulated.
        args: Its arguments; the data among them give the shapes alone.
        num_sets: How many data sets are simulated; rounded up to a multiple of 64.
        num_steps: How many leapfrog steps are made along each one's true gradient.
        hidden: The widths of the network's hidden layers.
        training_steps: The most steps of the optimiser, for the guess and for the energy each.
        summary: From observed values by site to what the network sees of them, a vector; where
            they differ by orders of magnitude, their logarithms.
        disable_progbar: Whether to show no progress: else it is a bar, or where nobody watches (in
            a file, or where ``CI`` is set) a line each half minute.
        kwargs: The model's keyword arguments.

    Returns:
        The surrogate, to be passed to a kernel, whose chains begin where it expects the posterior,
        with its spread as their first inverse mass. A warm-up of 60 iterations, with
        ``adapt_mass_matrix=False``, then does.

    Raises:
        ValueError: If a number is not positive, the model observes nothing, or the summary is no
            vector.

    Example:
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(mean, 1.0).expand([3]).to_event(1), obs=y)
        >>> sizes = {"num_sets": 64, "training_steps": 50, "disable_progbar": True}
        >>> surrogate = learn_surrogate(model, torch.zeros(3), **sizes)
        >>> surrogate.guess.sizes["context_dimension"]
        3
    """
    for name, number in (
        ("num_sets", num_sets),
        ("num_steps", num_steps),
        ("training_steps", training_steps),
    ):
        whole(name, number, 1)
    with progress(None, "Simulate", hidden=disable_progbar) as bar:
        sets = SimulatedSets(model, args, kwargs, num_sets, bar)
        context = torch.stack([summary(data) for data in sets.data()]).to(sets.example)
        if context.dim() != 2:
            raise ValueError(
                f"the summary of the data has shape {tuple(context.shape[1:])}: expected a vector"
            )
        bar.set_description("Fit guess")
        bar.reset(total=training_steps)
        guess = _fit_guess(sets.position, context, training_steps, bar)
        points = _gather(sets, guess, context, num_steps)
        bar.set_description("Fit energy")
        bar.reset(total=training_steps)
        network = PotentialNetwork(
            guess.dimension, hidden=hidden, context_dimension=points.context.shape[1]
        ).to(sets.example)
        network.whiten_by(points.position, points.context)
        training = fit_energy(
            network,
            points,
            # Each data set's energy has its own constant.
            loss=GradientMatching(energy_weight=0.0),
            num_steps=training_steps,
            learning_rate=FIRST_RATE,
            bar=bar,
        )
    return AmortizedSurrogate(guess, network, summary, training, sets.n_gradients)


def _fit_guess(position: Tensor, context: Tensor, steps: int, bar: Bar) -> ConditionalGaussian:
    """A Gaussian of the parameters given a summary of the data, by maximum likelihood."""
    good = position.isfinite().all(-1) & context.isfinite().all(-1)
    position, context = position[good], context[good]
    guess: Any = ConditionalGaussian(position.shape[1], context.shape[1]).to(position)
    guess.whiten_by(position, context)

    def loss(guess: Any, points: Points) -> Tensor:
        energy: Tensor = guess(points.position, points.context).mean()
        return energy

    points = Points(position, torch.zeros_like(position[:, 0]), position, context)
    fit_energy(guess, points, loss=loss, num_steps=steps, learning_rate=_GUESS_RATE, bar=bar)
    fitted: ConditionalGaussian = guess
    return fitted


def _gather(
    sets: SimulatedSets, guess: ConditionalGaussian, context: Tensor, num_steps: int
) -> Points:
    """True energies and gradients in the guess's units, along trajectories from exact draws."""
    location, root = guess.place(context)
    start = matvec(torch.linalg.inv(root), sets.position - location)
    groups = sets.groups()

    def follow(
        group: slice, value_and_gradient: ValueAndGradients, size: float
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        middle, scale = location[group], root[group]

        def whitened(w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, gradient = value_and_gradient(middle + matvec(scale, w))
            return value, matvec(scale.mT, gradient)

        w = start[group]
        r, ones = torch.randn_like(w), torch.ones_like(w[0])
        value, gradient = whitened(w, w[:, :0])
        before = value + 0.5 * r.square().sum(-1)
        found, step = [(w, value, gradient)], w.new_tensor(size)
        for _ in range(num_steps):
            w, r, value, gradient = leapfrog_step(whitened, w, r, gradient, w[:, :0], ones, step)
            found.append((w, value, gradient))
        rate = torch.exp(before - value - 0.5 * r.square().sum(-1)).clamp(max=1.0)
        return found, rate.nan_to_num()

    size = 0.5
    while float(follow(*groups[0], size)[1].mean()) < _LEAST_RATE and size > 1e-4:
        size /= 2
    rows = []
    for group, gradient in groups:
        found, _ = follow(group, gradient, size * (0.5 + float(torch.rand(()))))
        probed = probe(gradient, location[group], root[group])
        seen = torch.cat([guess.standardised(context[group]), probed], -1)
        # Data set by data set, so that what is held out are data sets.
        parts = [torch.stack(part, 1).flatten(0, 1) for part in zip(*found, strict=True)]
        rows.append((*parts, seen.repeat_interleave(num_steps + 1, 0)))
    points = Points(*(torch.cat(part) for part in zip(*rows, strict=True)))
    good = points.position.isfinite().all(-1) & points.gradient.isfinite().all(-1)
    return points.pick(good & points.value.isfinite())
