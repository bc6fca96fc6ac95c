"""The densities of Pyro's own guides, all sites on the real line in one vector."""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor

from pyro_hamflow.flows.flow_guide import FlowGuide
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.kinds import Args


class Part(Protocol):
    """A density of some sites, in the order of ``sizes``, which tells how long each is."""

    @property
    def sizes(self) -> dict[str, int]: ...

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]: ...

    def log_ratio(self, position: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _FromDistribution:
    sizes: dict[str, int]
    posterior: Any

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        position = self.posterior.rsample((num_samples,))
        return position, self.posterior.log_prob(position)

    def log_ratio(self, position: Tensor) -> Tensor:
        return self.posterior.log_prob(position)


@dataclass(frozen=True)
class _FromFlow:
    sizes: dict[str, int]
    guide: DensityGuide

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        return self.guide.draw(num_samples)

    def log_ratio(self, position: Tensor) -> Tensor:
        return self.guide.log_ratio(position)


class _Structured:
    """Normal vectors, each moved by functions of those before it, which do not change volumes."""

    def __init__(self, guide: AutoStructured) -> None:
        names = [name for name, _ in guide._sorted_sites]
        self.locs = {name: attrgetter(name)(guide.locs) for name in names}
        self.roots = {name: _root(guide, name) for name in names}
        self.moves = {
            name: {u: attrgetter(u)(attrgetter(name)(guide.deps)) for u in guide.dependencies[name]}
            if name in guide.dependencies
            else {}
            for name in names
        }
        self.sizes = {name: self.locs[name].numel() for name in guide._batch_shapes}

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        free: dict[str, Tensor] = {}
        log_density = torch.zeros(())
        for name, root in self.roots.items():
            normal = torch.randn(num_samples, len(root)).to(root)
            log_density = log_density + self._log_density(name, normal)
            free[name] = normal @ root.mT + self._moved(name, free)
        position = [free[name] + self.locs[name] for name in self.sizes]
        return torch.cat(position, -1), log_density

    def log_ratio(self, position: Tensor) -> Tensor:
        parts = zip(self.sizes, position.split(list(self.sizes.values()), -1), strict=True)
        free = {name: part - self.locs[name] for name, part in parts}
        log_density = position.new_zeros(len(position))
        for name, root in self.roots.items():
            rest = (free[name] - self._moved(name, free)).mT
            normal = torch.linalg.solve_triangular(root, rest, upper=False).mT
            log_density = log_density + self._log_density(name, normal)
        return log_density

    def _moved(self, name: str, free: dict[str, Tensor]) -> Tensor:
        start = torch.zeros_like(self.locs[name])
        return sum((move(free[upstream]) for upstream, move in self.moves[name].items()), start)

    def _log_density(self, name: str, normal: Tensor) -> Tensor:
        standard = dist.Normal(torch.zeros_like(normal), 1.0).to_event(1)
        return standard.log_prob(normal) - self.roots[name].diagonal().log().sum()


def _root(guide: AutoStructured, name: str) -> Tensor:
    """The triangular root of a vector's covariance, before what moves it."""
    scale = attrgetter(name)(guide.scales)
    if guide.conditionals[name] == "normal":
        return scale.diag()
    return scale[:, None] * attrgetter(name)(guide.scale_trils)


class _Joined:
    """Parts that are independent of each other, their sites in the model's order."""

    def __init__(self, parts: list[Part], names: list[str]) -> None:
        self.parts = parts
        owner = {name: (part, size) for part in parts for name, size in part.sizes.items()}
        self.sizes = {name: owner[name][1] for name in names if name in owner}
        columns = torch.arange(sum(self.sizes.values())).split(list(self.sizes.values()))
        places = dict(zip(self.sizes, columns, strict=True))
        self.columns = [torch.cat([places[name] for name in part.sizes]) for part in parts]

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        drawn = [part.draw(num_samples) for part in self.parts]
        order = torch.cat(self.columns).argsort()
        position = torch.cat([position for position, _ in drawn], -1)[:, order]
        return position, torch.stack([log_density for _, log_density in drawn]).sum(0)

    def log_ratio(self, position: Tensor) -> Tensor:
        pairs = zip(self.parts, self.columns, strict=True)
        return torch.stack([part.log_ratio(position[:, at]) for part, at in pairs]).sum(0)


def part_of(guide: Any, args: Args, kwargs: dict[str, Any]) -> Part:
    """The density of a guide's sites, at its present parameters.

    Arguments:
        guide: One of Pyro's, or a flow, which has seen its model.
        args: The model's arguments.
        kwargs: The model's keyword arguments.

    Raises:
        ValueError: If what an ``AutoLaplaceApproximation`` stands at is no mode.
    """
    if isinstance(guide, AutoGuideList):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        return _Joined([part_of(part, args, kwargs) for part in guide], names)
    if isinstance(guide, AutoNormal):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        places = [guide._get_loc_and_scale(name) for name in names]
        loc, scale = (torch.cat([t.reshape(-1) for t in ts]) for ts in zip(*places, strict=True))
        sizes = {name: place[0].numel() for name, place in zip(names, places, strict=True)}
        return _FromDistribution(sizes, dist.Normal(loc, scale).to_event(1))
    if isinstance(guide, AutoLaplaceApproximation):
        try:
            with torch.enable_grad():
                guide = guide.laplace_approximation(*args, **kwargs)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "the curvature at the mode of an AutoLaplaceApproximation is not positive: "
                "expected one whose mode has been found, by `fit_guide` or `pyro.infer.SVI`"
            ) from error
    if isinstance(guide, AutoStructured):
        return _Structured(guide)
    sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    if isinstance(guide, FlowGuide):
        return _FromFlow(sizes, guide)
    return _FromDistribution(sizes, guide.get_posterior(*args, **kwargs))
