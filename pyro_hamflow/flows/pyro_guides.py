"""Pyro's own guides as guides whose draws are corrected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
)
from torch import Tensor

from pyro_hamflow.checks import fills
from pyro_hamflow.flows.flow_guide import FlowGuide
from pyro_hamflow.model.guides import DensityGuide
from pyro_hamflow.model.kinds import Args
from pyro_hamflow.programs.validation import no_validation


def as_guide(name: str, guide: Any, protocol: type) -> Any:
    """A guide that fills a protocol: itself, or one of Pyro's made to.

    Arguments:
        name: Of the argument.
        guide: What the user gave.
        protocol: What is asked of it.

    Raises:
        TypeError: If it does not, and cannot be made to.
    """
    if isinstance(guide, AutoGuide) and not isinstance(guide, FlowGuide):
        guide = PyroGuide(guide, name)
    fills(name, guide, protocol)
    return guide


class PyroGuide:
    """One of Pyro's guides, all of its sites on the real line in one vector.

    Arguments:
        guide: An ``AutoNormal``, any ``AutoContinuous`` such as ``AutoMultivariateNormal``, or an
            ``AutoGuideList`` of them and of flows. An ``AutoLaplaceApproximation`` stands for the
            Gaussian that it makes of the model's arguments.
        name: Of the argument that it was given as, for messages.

    Raises:
        TypeError: If it is of another kind: ``AutoDelta``, for one, has no density.

    Example:
        >>> def model():
        ...     pyro.sample("x", dist.Normal(0.0, 1.0))
        >>> guide = PyroGuide(pyro.infer.autoguide.AutoNormal(model, init_scale=0.5))
        >>> guide.prepare()
        >>> guide.log_ratio(torch.zeros(1, 1)).exp()
        tensor([0.7979])
    """

    def __init__(self, guide: AutoGuide, name: str = "guide") -> None:
        _refuse_unknown(guide, name)
        self._guide, self._name = guide, name
        self._part: _Part | None = None

    def __repr__(self) -> str:
        return repr(self._guide)

    @torch.no_grad()
    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Has the guide see the model, unless it has, and takes its density as it now is."""
        with poutine.block(), no_validation():
            self._guide(*args, **kwargs)
            self._part = _part_of(self._guide, args, kwargs)

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)`` and their log densities, ``(num_samples,)``."""
        return self._known().draw(num_samples)

    def log_ratio(self, position: Tensor) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``.

        Raises:
            ValueError: If the guide is a flow that knows no way back from positions that it has not
                drawn.
        """
        try:
            return self._known().log_ratio(position)
        except (KeyError, NotImplementedError) as error:
            raise ValueError(
                f"`{self._name}` is an {type(self._guide).__name__} whose map has no inverse, so "
                "that only draws of its own have a density: expected one that has; "
                "`importance_sample` takes this one"
            ) from error

    def _known(self) -> _Part:
        if self._part is None:
            raise RuntimeError("the guide has not seen its model yet: call `prepare` first")
        return self._part


class _Part(Protocol):
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


class _Joined:
    """Parts that are independent of each other, their sites in the model's order."""

    def __init__(self, parts: list[_Part], names: list[str]) -> None:
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


def _part_of(guide: Any, args: Args, kwargs: dict[str, Any]) -> _Part:
    if isinstance(guide, AutoGuideList):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        return _Joined([_part_of(part, args, kwargs) for part in guide], names)
    if isinstance(guide, AutoNormal):
        names = [name for name, _ in guide.prototype_trace.iter_stochastic_nodes()]
        places = [guide._get_loc_and_scale(name) for name in names]
        loc, scale = (torch.cat([t.reshape(-1) for t in ts]) for ts in zip(*places, strict=True))
        sizes = {name: place[0].numel() for name, place in zip(names, places, strict=True)}
        return _FromDistribution(sizes, dist.Normal(loc, scale).to_event(1))
    if isinstance(guide, AutoLaplaceApproximation):
        with torch.enable_grad():
            guide = guide.laplace_approximation(*args, **kwargs)
    sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    if isinstance(guide, FlowGuide):
        return _FromFlow(sizes, guide)
    return _FromDistribution(sizes, guide.get_posterior(*args, **kwargs))


def _refuse_unknown(guide: Any, name: str) -> None:
    """Raises a TypeError if the density of a guide, or of a part of it, is not known."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            _refuse_unknown(part, name)
    elif not isinstance(guide, AutoNormal | AutoContinuous):
        raise TypeError(
            f"`{name}` is an {type(guide).__name__}, whose density on the real line is not known: "
            "expected an AutoNormal, an AutoContinuous such as AutoMultivariateNormal, or an "
            "AutoGuideList of them"
        )
