"""A model bound to its arguments, and runs of it with chosen values of its local sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyro.poutine import Trace
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.structure import Group, Structure
from pyro_hamflow.model.kinds import Args, Kwargs, Model, Node
from pyro_hamflow.model.trace import (
    log_density,
    run_with,
    sum_rows,
    sum_to_elements,
    vectorized_frames,
)


@dataclass(frozen=True)
class Plan:
    """A model bound to its arguments, and what is known of it.

    Attributes:
        model: The original model.
        args: Its arguments.
        kwargs: Its keyword arguments.
        structure: Its local sites and what depends on them.
        layouts: The noise of each group of local sites.
    """

    model: Model
    args: Args
    kwargs: Kwargs
    structure: Structure
    layouts: dict[str, Layout]

    def trace(self, values: Mapping[str, Tensor]) -> Trace:
        """A run of the model with values of some sites."""
        return run_with(self.model, lambda msg: values.get(msg["name"]), *self.args, **self.kwargs)

    def run(
        self,
        group: Group,
        parameters: dict[str, Tensor],
        choose_local: Callable[[Message], Tensor],
    ) -> list[Tensor]:
        """Runs the model and returns its terms in a group's estimate, summed to elements."""

        def choose(msg: Message) -> Tensor | None:
            if msg["name"] in group.sites:
                return choose_local(msg)
            return parameters.get(msg["name"], self.structure.placeholders.get(msg["name"]))

        trace = run_with(self.model, choose, *self.args, **self.kwargs)
        return [
            self.sum(log_density(trace.nodes[name]), trace.nodes[name], group)
            for name in group.terms
        ]

    def sum(self, density: Tensor, site: Node, group: Group) -> Tensor:
        """Sums a site's log densities to the elements of a group."""
        rows = group.rows.get(site["name"])
        if rows is not None:
            return sum_rows(density, rows, group.frames, self.structure.nesting)
        frames = vectorized_frames(site)
        return sum_to_elements(density, frames, group.frames, self.structure.nesting)
