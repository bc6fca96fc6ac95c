"""Data sets simulated from a model, and the true gradients of all their posteriors at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.poutine as poutine
import torch
from torch import Tensor

from pyro_hamflow.dynamics.integrators import ValueAndGradients
from pyro_hamflow.model.gradients import value_and_gradients
from pyro_hamflow.model.kinds import Args, Kwargs, Model
from pyro_hamflow.model.potential import Potential
from pyro_hamflow.programs.capture import batch, capture
from pyro_hamflow.progress import Bar

_TOGETHER = 64  # data sets in a call of the program that is captured for so many


class SimulatedSets:
    """Parameters drawn from the prior, and data given them: each a draw of its own posterior.

    Arguments:
        model: A Pyro model without noise sites.
        args: Its arguments; the data among them give the shapes alone.
        kwargs: Its keyword arguments.
        num_sets: How many are simulated; rounded up to a multiple of 64.
        bar: Told of each.

    Attributes:
        position: The parameters on the real line, of shape ``(sets, dimension)``.
        values: The data of each observed site, sets first.
        n_gradients: How many true gradients were computed so far.

    Raises:
        ValueError: If the model observes nothing.
    """

    def __init__(
        self,
        model: Model,
        args: Args,
        kwargs: Kwargs,
        num_sets: int,
        bar: Bar,
    ) -> None:
        data = dict(observed(Potential(model, args, kwargs)))
        if not data:
            raise ValueError("the model observes nothing: expected data to simulate")

        def conditioned(*args: Any, **kwargs: Any) -> Any:
            return poutine.condition(poutine.uncondition(model), data)(*args, **kwargs)

        potential = Potential(conditioned, args, kwargs)
        names = list(data)

        def value_and_gradient(position: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
            data.update(zip(names, values, strict=True))
            with torch.enable_grad():
                position = position.detach().requires_grad_()
                return value_and_gradients(potential.value_of_one(position, position[:0]), position)

        sets = []
        count = -(-num_sets // _TOGETHER) * _TOGETHER
        bar.reset(total=count)
        for _ in range(count):
            with torch.no_grad(), poutine.block():
                trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
            nodes = trace.nodes
            position = potential.flatten({s.name: nodes[s.name]["value"] for s in potential.sites})
            sets.append((position, *(nodes[name]["value"] for name in names)))
            bar.update()
        self.position, *self.values = (torch.stack(part) for part in zip(*sets, strict=True))
        self.names = names
        self.example = potential.example
        self.n_gradients = 0
        kept = dict(data)
        graph = capture(value_and_gradient, *sets[0])
        data.update(kept)
        examples = (part[:_TOGETHER] for part in (self.position, *self.values))
        self._program = batch(graph, *examples)

    def data(self) -> list[dict[str, Tensor]]:
        """The data of each set, by site."""
        rows = zip(*self.values, strict=True)
        return [dict(zip(self.names, row, strict=True)) for row in rows]

    def groups(self) -> list[tuple[slice, ValueAndGradients]]:
        """Sets that are computed together, and a function for the posteriors of each group.

        Returns:
            Pairs of a slice of the sets; and what takes a position for each set of the slice, of
            shape ``(64, dimension)``, to the potentials and gradients of their posteriors there.
        """

        def function_of(group: slice) -> ValueAndGradients:
            values = [part[group] for part in self.values]

            def value_and_gradient(position: Tensor) -> tuple[Tensor, Tensor]:
                self.n_gradients += _TOGETHER
                value, gradient = self._program(position, *values)
                return value, gradient

            return value_and_gradient

        starts = range(0, len(self.position), _TOGETHER)
        slices = [slice(start, start + _TOGETHER) for start in starts]
        return [(group, function_of(group)) for group in slices]


def observed(potential: Potential) -> Mapping[str, Tensor]:
    """The observed values of a model's run, by site."""
    return {
        name: site["value"]
        for name, site in potential.plain_trace.nodes.items()
        if site["type"] == "sample"
        and site["is_observed"]
        and isinstance(site["value"], Tensor)
        and site["value"].numel() > 0
    }
