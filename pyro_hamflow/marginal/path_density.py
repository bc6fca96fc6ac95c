r"""The log density of a latent path as a function of flat coordinates, and its expansion.

A path is whatever many numbers are integrated out by one estimate: the states of a chain of sites,
one vector of them, or the elements of a plate that depend on each other. Its coordinates are its
values moved to the real line, in an *order* in which those that meet in one term lie close
together. So minus the Hessian of its log density has few bands, which a few products with it tell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule

from pyro_hamflow.marginal.noise_layout import Layout
from pyro_hamflow.marginal.plan import Plan
from pyro_hamflow.marginal.structure import Group
from pyro_hamflow.model.supports import transform_of
from pyro_hamflow.programs import banded
from pyro_hamflow.programs.capture import capture, result_of

Density = Callable[[Tensor], Tensor]  # from a path to the log density of each element


class Parts(NamedTuple):
    """The log density of a path: that of its own sites, and that of what is observed given them."""

    prior: Density
    likelihood: Density


PartsAt = Callable[[dict[str, Tensor]], Parts]  # for values of the parameters


class Order(NamedTuple):
    """How a path's coordinates come from those of its sites.

    Attributes:
        places: The numbers of the sites' coordinates, in the path's order.
        lag: If not zero, the path is the running sum of these, each added to the one that lies so
            far before: sites that are the steps of a path.
        times: How often they are summed so: twice for steps of steps.
    """

    places: Tensor
    lag: int = 0
    times: int = 1

    def to_sites(self, path: Tensor) -> Tensor:
        """The sites' coordinates, ``(*group.shape, n)``."""
        for _ in range(self.times if self.lag else 0):
            before = torch.nn.functional.pad(path[..., : -self.lag], (self.lag, 0))
            path = path - before
        return _permuted(path, self.places.argsort())

    def from_sites(self, coordinates: Tensor) -> Tensor:
        """The inverse of :meth:`to_sites`, which has the same volume."""
        path = _permuted(coordinates, self.places)
        for _ in range(self.times if self.lag else 0):
            path = path.unflatten(-1, (-1, self.lag)).cumsum(-2).flatten(-2)
        return path


def _permuted(path: Tensor, places: Tensor) -> Tensor:
    """The coordinates at some places; the path as it is where these are its own."""
    natural = torch.arange(len(places), device=places.device)
    return path if torch.equal(places, natural) else path[..., places]


class Expansion(NamedTuple):
    """A log density to second order about a place.

    Attributes:
        gradient: Of shape ``(*group.shape, n)``.
        bands: The lower bands of minus the Hessian, ``(*group.shape, n, p + 1)``.
    """

    gradient: Tensor
    bands: Tensor


@dataclass(frozen=True)
class PathCoordinates:
    """How a path's flat coordinates become values of its sites.

    Attributes:
        group: The group of local sites that the path consists of.
        layout: Which coordinates serve which site.
        order: How the path comes from these coordinates.
    """

    group: Group
    layout: Layout
    order: Order

    def site(self, name: str, fn: Any, path: Tensor) -> tuple[Tensor, Tensor]:
        """A site's value, and its log density with the volume that the transform takes.

        Arguments:
            name: The site.
            fn: Its prior.
            path: Of shape ``(*group.shape, n)``.
        """
        free = self.layout.blocks[name].spread(self.order.to_sites(path), self.group)
        transform = transform_of(name, fn)
        value = transform(free)
        return value, fn.log_prob(value) + transform.log_abs_det_jacobian(free, value)

    def collect(self, values: dict[str, tuple[Any, Tensor]]) -> Tensor:
        """The path of sites' priors and values."""
        parts = []
        for name, block in self.layout.blocks.items():
            fn, value = values[name]
            free = transform_of(name, fn).inv(value)
            parts.append(block.collect(free, self.group).to(self.layout.example))
        return self.order.from_sites(torch.cat(parts, -1))


def path_parts(plan: Plan, path: PathCoordinates, parameters: dict[str, Tensor]) -> Parts:
    """The log densities of a path, for given values of the parameters."""
    evaluate = partial(_evaluate, plan, path, parameters)
    return Parts(lambda x: evaluate(x)[0], lambda x: evaluate(x)[1])


def _evaluate(
    plan: Plan, path: PathCoordinates, parameters: dict[str, Tensor], x: Tensor
) -> tuple[Tensor, Tensor]:
    """Both log densities of a path."""
    group, own = path.group, list[Tensor]()

    def choose(msg: Any) -> Tensor:
        value, density = path.site(msg["name"], msg["fn"], x)
        own.append(plan.sum(msg["scale"] * density, msg, group))
        return value

    terms = plan.run(group, parameters, choose)
    zero = torch.zeros_like(x[..., 0])
    return zero + _joined(own, group), zero + _joined(terms, group)


def captured_parts(
    plan: Plan, path: PathCoordinates, x: Tensor, parameters: dict[str, Tensor]
) -> PartsAt:
    """What :func:`path_parts` gives for values of the parameters, without running the model anew.

    Arguments:
        plan: The model.
        path: The path's coordinates.
        x: A path to run the model with.
        parameters: Values of the parameters to run it with.

    Raises:
        RuntimeError: If the model cannot be captured.
    """
    names = list(parameters)

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        return _evaluate(plan, path, dict(zip(names, values, strict=True)), x)

    both = capture(run, x, *parameters.values())
    programs = [result_of(both, number) for number in range(2)]

    def parts_at(parameters: dict[str, Tensor]) -> Parts:
        values = [parameters[name] for name in names]
        prior, likelihood = (partial(_call, part, values) for part in programs)
        return Parts(prior, likelihood)

    return parts_at


def _call(program: GraphModule, values: list[Tensor], x: Tensor) -> Tensor:
    result: Tensor = program(x, *values)
    return result


def _joined(terms: list[Tensor], group: Group) -> Any:
    return sum(terms[1:], start=terms[0]).reshape(group.shape) if terms else 0.0


def products(density: Density, x: Tensor, directions: Tensor) -> Tensor:
    """Minus the Hessian of a log density times some directions, ``(count, *group.shape, n)``."""

    def along(direction: Tensor) -> Tensor:
        def slope(x: Tensor) -> Tensor:
            return (gradient(density, x) * direction).sum()

        return -torch.func.grad(slope)(x)

    return torch.func.vmap(along)(directions)


def gradient(density: Density, x: Tensor) -> Tensor:
    """The gradient of a log density of independent elements."""
    found: Tensor = torch.func.grad(lambda x: density(x).sum())(x)
    return found


def expand(density: Density, x: Tensor, width: int) -> Expansion:
    """Expands a log density whose Hessian has ``width`` lower bands, the diagonal included."""
    marks = banded.probes(x, width)
    marks = marks.reshape(len(marks), *[1] * (x.dim() - 1), -1).expand(len(marks), *x.shape)
    bands = banded.bands_seen(products(density, x, marks), width)
    return Expansion(gradient(density, x), bands)
