"""Pyro's own guides as guides whose draws are corrected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pyro
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
from pyro_hamflow.flows.pyro_densities import Part, part_of
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
    arguments: that has nothing to train. Its mode is found by a :class:`ModeSearch`.

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
        >>> guide.log_ratio(torch.zeros(1, 1)).exp().detach()
        tensor([0.7979])
    """

    def __init__(self, guide: AutoGuide, name: str = "guide") -> None:
        _refuse_unknown(guide, name)
        self._guide, self._name = guide, name
        self._arguments: tuple[Args, dict[str, Any]] | None = None
        self._part: Part | None = None
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

    def _known(self) -> Part:
        """The density at the present parameters, made anew while these are learnt."""
        if self._arguments is None:
            raise RuntimeError("the guide has not seen its model yet: call `prepare` first")
        learns = torch.is_grad_enabled() and any(True for _ in self.parameters())
        versions = [tensor._version for tensor in self._guide.parameters()]
        if self._part is not None and not learns and versions == self._versions:
            return self._part
        with poutine.block(), no_validation(), torch.set_grad_enabled(learns):
            part = part_of(self._guide, *self._arguments)
        self._part, self._versions = None if learns else part, versions
        return part

    # --- trained as the guide is ----------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        return iter(()) if _has_laplace(self._guide) else self._guide.parameters()

    def state_dict(self) -> dict[str, Any]:
        return self._guide.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        return self._guide.load_state_dict(state_dict)


class ModeSearch(PyroGuide):
    """An ``AutoLaplaceApproximation`` that trains as in Pyro: as a point, which comes to the mode.

    With gradients its draws are that point, whose density counts as one; without them they are
    those of the Gaussian.

    Arguments:
        guide: The guide.
    """

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        if not torch.is_grad_enabled():
            return super().draw(num_samples)
        loc = self._guide.loc
        return loc.expand(num_samples, -1), loc.new_zeros(num_samples)

    def log_ratio(self, position: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError(
                "`guide` is an AutoLaplaceApproximation, which trains as a point and has no "
                "density of draws then: expected the loss `ReverseKL`, or another guide"
            )
        return super().log_ratio(position)

    def parameters(self) -> Iterator[nn.Parameter]:
        return self._guide.parameters()


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
