r"""A learned energy for all data sets of a model: trained once, followed on each without training.

A parameter drawn from the prior, and data drawn given it, are a draw of the posterior given these
data: simulation supplies exact draws of as many posteriors as are wanted. From these, a Gaussian
learns where each posterior lies. In the units of that guess all posteriors look alike, and a
network of parameters and data is fitted to the true gradients, there and along short trajectories.
What the data say is best told by the posterior itself: beside a summary of them, the network sees
the true gradients at a few points of the guess, which cost next to nothing for a new data set.

Given new data, it is a surrogate like any other: what it has not learned costs acceptance, not
exactness.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_hamflow.checks import whole
from pyro_hamflow.dynamics.integrators import leapfrog_step
from pyro_hamflow.model.potential import Potential, with_slopes
from pyro_hamflow.networks.conditional_gaussian import ConditionalGaussian
from pyro_hamflow.surrogates.amortized.probes import probe, probed_points, turned
from pyro_hamflow.surrogates.amortized.simulated import SimulatedSets, ValueAndGradients, observed
from pyro_hamflow.surrogates.fit import EnergyTraining, fit_energy
from pyro_hamflow.surrogates.losses import GradientMatching, Points
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

Summary = Callable[[Mapping[str, Tensor]], Tensor]
_LEAST_RATE = 0.9  # of acceptance, at which trajectories hardly leave their energy
_GUESS_RATE, _ENERGY_RATE = 3e-3, 1e-2  # of learning: the latter as where one posterior is learned


def flatten_data(data: Mapping[str, Tensor]) -> Tensor:
    """The observed values in one row, of shape ``(context_dimension,)``."""
    return torch.cat([value.reshape(-1) for value in data.values()])


class AmortizedSurrogate:
    """A learned energy of parameters and data.

    Arguments:
        guess: Where the posterior lies, given a summary of the data.
        network: The energy in the guess's units, whose context is that summary and true gradients
            about the guess.
        summary: From observed values by site to the summary.
        training: What the energy's training took and reached.
        n_gradients: True gradients spent on it.
    """

    def __init__(
        self,
        guess: ConditionalGaussian,
        network: PotentialNetwork,
        summary: Summary,
        training: EnergyTraining,
        n_gradients: int,
    ) -> None:
        self.guess = guess
        self.network = network
        self.summary = summary
        self.training = training
        self.n_gradients = n_gradients

    @property
    def n_probes(self) -> int:
        """True gradients that each new data set takes before its first draw."""
        return len(probed_points(self.guess.centre))

    def at(self, potential: Potential) -> PotentialNetwork:
        """The energy given a potential's data.

        Raises:
            ValueError: If the model or the data have another size than those it was trained on.
        """
        example = potential.example
        guess = copy.deepcopy(self.guess).to(example)
        if potential.dimension != guess.dimension:
            raise ValueError(
                f"`surrogate` has dimension {guess.dimension}: expected {potential.dimension}, as "
                f"the model's sites {[site.name for site in potential.sites]} have"
            )
        context = self.summary(observed(potential)).to(example)
        expected = guess.context_dimension
        if tuple(context.shape) != (expected,):
            raise ValueError(
                f"the summary of the data has shape {tuple(context.shape)}: expected "
                f"({expected},), as in training"
            )
        location, root = guess.place(context)
        noise = potential.draw_noise(1)[0]

        def gradient(position: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                value, slope = with_slopes(potential.value_of_one(position, noise), position)
            return value, slope

        probed = probe(gradient, location, root)
        network = copy.deepcopy(self.network).to(example)
        network = network.given(torch.cat([guess.standardised(context), probed]))
        with torch.no_grad():
            network.centre.copy_(location + root @ network.centre)
            network.root.copy_(root @ network.root)
            network.inverse_root.copy_(torch.linalg.inv(network.root))
        return network

    def save(self, path: str | Path) -> None:
        """Writes it to a file: sizes, weights, what the training took; not the summary."""
        content = {
            part: {"sizes": module.sizes, "weights": module.state_dict()}
            for part, module in (("guess", self.guess), ("network", self.network))
        }
        flat = self.summary is flatten_data
        record = {"training": asdict(self.training), "n_gradients": self.n_gradients}
        torch.save(content | record | {"flat": flat}, path)

    @classmethod
    def load(cls, path: str | Path, *, summary: Summary | None = None) -> AmortizedSurrogate:
        """Reads what :meth:`save` wrote, in the precision that it was written in.

        Arguments:
            path: The file.
            summary: The function that it was trained with, if that was given.

        Raises:
            ValueError: If the file holds something else, or a summary is missing.
        """
        content = torch.load(path, weights_only=True, map_location="cpu")
        keys = {"guess", "network", "training", "n_gradients", "flat"}
        if not isinstance(content, dict) or content.keys() != keys:
            raise ValueError(f"'{path}' holds no amortised surrogate: expected {sorted(keys)}")
        if summary is None and not content["flat"]:
            raise ValueError(
                f"'{path}' was trained with a summary of its own: expected it as `summary`"
            )
        guess = _restored(ConditionalGaussian, content["guess"])
        network = _restored(PotentialNetwork, content["network"])
        training = EnergyTraining(**content["training"])
        return cls(guess, network, summary or flatten_data, training, content["n_gradients"])


Module = TypeVar("Module", ConditionalGaussian, PotentialNetwork)


def _restored(kind: type[Module], content: dict[str, Any]) -> Module:
    module = kind(**content["sizes"]).to(content["weights"]["centre"].dtype)
    module.load_state_dict(content["weights"])
    return module


def learn_surrogate(
    model: Callable[..., Any],
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
        disable_progbar: Whether to show no progress bar; nor is it shown where ``CI`` is set.
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
    hidden_bar = disable_progbar or "CI" in os.environ
    with tqdm(disable=hidden_bar, desc="Simulate") as bar:
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
            learning_rate=_ENERGY_RATE,
            bar=bar,
        )
    return AmortizedSurrogate(guess, network, summary, training, sets.n_gradients)


def _fit_guess(
    position: Tensor, context: Tensor, steps: int, bar: tqdm[Any]
) -> ConditionalGaussian:
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
    start = turned(torch.linalg.inv(root), sets.position - location)
    groups = sets.groups()

    def follow(
        group: slice, gradient: ValueAndGradients, size: float
    ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], Tensor]:
        middle, turn = location[group], root[group]

        def gradient_of(w: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
            value, slope = gradient(middle + turned(turn, w))
            return value, turned(turn.mT, slope)

        w = start[group]
        r, ones = torch.randn_like(w), torch.ones_like(w[0])
        value, slope = gradient_of(w, w[:, :0])
        before = value + 0.5 * r.square().sum(-1)
        found, step = [(w, value, slope)], w.new_tensor(size)
        for _ in range(num_steps):
            w, r, value, slope = leapfrog_step(gradient_of, w, r, slope, w[:, :0], ones, step)
            found.append((w, value, slope))
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
