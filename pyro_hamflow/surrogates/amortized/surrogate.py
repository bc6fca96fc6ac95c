r"""A learned energy for all data sets of a model: trained once, followed on each without training.

A parameter is drawn from the prior, and data given it: the parameter is then an exact draw of the
posterior given these data. So simulation supplies exact draws of as many posteriors as are wanted.
From these, a Gaussian learns where each posterior lies. In the units of that guess all posteriors
look alike, and a network of parameters and data is fitted to the true gradients, there and along
short trajectories. The network sees the data by a summary, and by the true gradients at a few
points of the guess, which cost next to nothing for a new data set.

At new data, it is a surrogate like any other: what it has not learned costs acceptance, not
exactness.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_hamflow import files
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.networks.conditional_gaussian import ConditionalGaussian
from pyro_hamflow.surrogates.amortized.probes import probe, probed_points
from pyro_hamflow.surrogates.amortized.simulated import observed
from pyro_hamflow.surrogates.fit import EnergyTraining
from pyro_hamflow.surrogates.potential_network import PotentialNetwork

_KIND = "amortised surrogate"  # what its files say that they hold

Summary = Callable[[Mapping[str, Tensor]], Tensor]


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

        def value_and_gradient(position: Tensor) -> tuple[Tensor, ...]:
            return potential.function("gradient")(position, noise)

        probed = probe(value_and_gradient, location, root)
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
        files.save(path, _KIND, content | record | {"flat": flat})

    @classmethod
    def load(cls, path: str | Path, *, summary: Summary | None = None) -> AmortizedSurrogate:
        """Reads what :meth:`save` wrote, in the precision that it was written in.

        Arguments:
            path: The file.
            summary: The function that it was trained with, if that was given.

        Raises:
            FileFault: If the file is damaged, or holds something else.
            ValueError: If a summary is missing.
        """

        def make(content: dict[str, Any]) -> tuple[bool, AmortizedSurrogate]:
            names = ["guess", "network", "training", "n_gradients", "flat"]
            guess, network, training, n_gradients, flat = files.parts(content, names)
            made = cls(
                files.restored(ConditionalGaussian, *files.parts(guess, ["sizes", "weights"])),
                PotentialNetwork.made_of_content(network),
                summary or flatten_data,
                EnergyTraining(**training),
                n_gradients,
            )
            return flat, made

        flat, made = files.load(path, _KIND, make)
        if summary is None and not flat:
            raise ValueError(
                f"'{path}' was trained with a summary of its own: expected it as `summary`"
            )
        return made
