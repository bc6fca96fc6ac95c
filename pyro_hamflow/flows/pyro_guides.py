"""Pyro's own guides as guides whose draws are corrected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Protocol

import pyro
import pyro.distributions as dist
import pyro.poutine as poutine
import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoGuide,
    AutoGuideList,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoStructured,
)
from torch import Tensor, nn

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

    It trains as that guide does: the parameters are the guide's own, except those of an
    ``AutoLaplaceApproximation``, which stands for the Gaussian that it makes of the model's
    arguments, and of which nothing is trained here.

    Arguments:
        guide: An ``AutoNormal``, any ``AutoContinuous`` such as ``AutoMultivariateNormal``, an
            ``AutoStructured`` of normal sites, or an ``AutoGuideList`` of them and of flows.
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
        self._arguments: tuple[Args, dict[str, Any]] | None = None
        self._part: _Part | None = None
        self._versions: list[int] = []

    def __repr__(self) -> str:
        return repr(self._guide)

    @torch.no_grad()
    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Has the guide see the model, unless it has.

        What is in Pyro's parameter store under the guide's names is the guide's, as ever; nothing
        is added there, so that guides of one class stay apart.

        Raises:
            ValueError: If it covers the noise of an estimated likelihood.
        """
        store = pyro.get_param_store()
        with poutine.block(), no_validation(), store.scope(store.get_state()):
            self._guide(*args, **kwargs)
        _refuse_noise(self._guide, self._name)
        self._arguments, self._part = (args, kwargs), None

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
        """The density at the present parameters, made anew while these are learnt."""
        if self._arguments is None:
            raise RuntimeError("the guide has not seen its model yet: call `prepare` first")
        learns = torch.is_grad_enabled() and any(True for _ in self.parameters())
        versions = [tensor._version for tensor in self._guide.parameters()]
        if self._part is not None and not learns and versions == self._versions:
            return self._part
        with poutine.block(), no_validation(), torch.set_grad_enabled(learns):
            part = _part_of(self._guide, *self._arguments)
        self._part, self._versions = None if learns else part, versions
        return part

    # --- trained as the guide is ----------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if _has_laplace(self._guide) else self._guide.parameters()

    def state_dict(self) -> dict[str, Any]:
        return self._guide.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        return self._guide.load_state_dict(state_dict)


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
        try:
            with torch.enable_grad():
                guide = guide.laplace_approximation(*args, **kwargs)
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                "the curvature at the mode of an AutoLaplaceApproximation is not positive: "
                "expected one whose mode has been found, by `pyro.infer.SVI`"
            ) from error
    if isinstance(guide, AutoStructured):
        return _Structured(guide)
    sizes = {name: shape.numel() for name, shape in guide._unconstrained_shapes.items()}
    if isinstance(guide, FlowGuide):
        return _FromFlow(sizes, guide)
    return _FromDistribution(sizes, guide.get_posterior(*args, **kwargs))


def _has_laplace(guide: AutoGuide) -> bool:
    parts = guide if isinstance(guide, AutoGuideList) else [guide]
    return any(isinstance(part, AutoLaplaceApproximation) for part in parts)


def _refuse_noise(guide: AutoGuide, name: str) -> None:
    """Raises a ValueError if a guide covers noise, which is drawn from its prior."""
    nodes = guide.prototype_trace.nodes
    noise = [site for site, node in nodes.items() if node.get("infer", {}).get("noise")]
    if noise:
        raise ValueError(
            f"`{name}` is an {type(guide).__name__} of the noise {noise} too, which stays at its "
            f"prior: expected a guide of `poutine.block(model, hide={noise})`"
        )


def _refuse_unknown(guide: Any, name: str) -> None:
    """Raises a TypeError if the density of a guide, or of a part of it, is not known."""
    if isinstance(guide, AutoGuideList):
        for part in guide:
            _refuse_unknown(part, name)
        return
    conditionals = guide.conditionals if isinstance(guide, AutoStructured) else {}
    kinds = conditionals.values() if isinstance(conditionals, dict) else [conditionals]
    if any(kind not in ("normal", "mvn") for kind in kinds):
        raise TypeError(
            f"`{name}` is an AutoStructured with sites whose density is not known: expected the "
            "conditional 'normal' or 'mvn' of each"
        )
    if not isinstance(guide, AutoNormal | AutoContinuous | AutoStructured):
        raise TypeError(
            f"`{name}` is an {type(guide).__name__}, whose density on the real line is not known: "
            "expected an AutoNormal, an AutoContinuous such as AutoMultivariateNormal, an "
            "AutoStructured of normal sites, or an AutoGuideList of them"
        )
