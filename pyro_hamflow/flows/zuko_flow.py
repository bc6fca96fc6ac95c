"""A flow of zuko, its base exchanged where another is wanted."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions.transforms import IndependentTransform

from pyro_hamflow.flows.bases import map_tensors
from pyro_hamflow.flows.start import PILOT_DRAWS

_QUIET = 0.01  # of their first size, that the last layers of a flow's networks begin with
_LARGEST_DIFFERENCE = 1e-3  # between a point and where its image comes from


class ZukoFlow(nn.Module):
    """A map from a base to a density, both ways with its volume.

    Arguments:
        lazy: A flow of zuko, whose transform leads from its density to its base.
        base: What to start from instead of its own base; that if not given.
    """

    def __init__(self, lazy: nn.Module, base: Any = None) -> None:
        super().__init__()
        self.lazy = lazy
        self.base = base

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Moves the base too, which is no module, when the flow moves or changes its type."""
        self.base = map_tensors(self.base, fn)
        return super()._apply(fn, *args, **kwargs)

    @torch.no_grad()
    def begin_near_base(self) -> None:
        """Makes the last layers of its networks small, if that takes it nearer to its base."""
        base = self.distribution()
        points = base.sample((PILOT_DRAWS,))
        distance = base.log_prob(points) - self.log_density(points)
        before = copy.deepcopy(self.lazy.state_dict())
        for module in self.lazy.modules():
            if isinstance(module, nn.Sequential):
                layers = [list(layer.parameters()) for layer in module]
                parameters = next((layer for layer in reversed(layers) if layer), [])
            else:
                parameters = list(module) if isinstance(module, nn.ParameterList) else []
            for parameter in parameters:
                parameter.mul_(_QUIET)
        if not base.log_prob(points).sub(self.log_density(points)).mean() < distance.mean():
            self.lazy.load_state_dict(before)

    def distribution(self) -> Any:
        """What it starts from, at the present parameters."""
        return self.lazy.base(None) if self.base is None else self.base  # type: ignore[operator]

    def transform(self) -> Any:
        """The transform from its density to its base, at the present parameters."""
        transform = self.lazy.transform(None)  # type: ignore[operator]
        single = transform.domain.event_dim == 0
        return IndependentTransform(transform, 1) if single else transform

    def draw(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Points ``(*shape, dimension)`` and their log density; gradients flow through both.

        Where no gradients are asked for, the density is that of the way back, which tells whether
        the way there was right.
        """
        base = self.distribution()
        z = base.rsample(shape) if base.has_rsample else base.sample(shape)
        if torch.is_grad_enabled():
            point, growth = self.transform().inv.call_and_ladj(z)
            return point, base.log_prob(z) - growth
        point = self.transform().inv(z)
        back, growth = self.transform().call_and_ladj(point)
        _tell_of_wrong_inverse((back - z).abs())
        return point, base.log_prob(back) + growth

    def log_density(self, point: Tensor) -> Tensor:
        """The log density of points ``(*, dimension)``, ``(*,)``."""
        z, growth = self.transform().call_and_ladj(point)
        return self.distribution().log_prob(z) + growth


def _tell_of_wrong_inverse(difference: Tensor) -> None:
    """Warns where what was drawn does not come from where it was drawn from."""
    wrong = ~(difference <= _LARGEST_DIFFERENCE).all(-1)
    if wrong.any():
        warnings.warn(
            f"The flow draws {int(wrong.sum())} of {wrong.numel()} points where its inverse, which "
            "is found by search, is not right: neither weights nor chains that use its draws are "
            "exact. Take a flow whose inverse is known, such as `NSF`, `RealNVP` or `MAF`.",
            RuntimeWarning,
            stacklevel=2,
        )


def refuse_other_flows(flow: Any) -> None:
    """Raises a TypeError if this is neither a flow of zuko nor what makes one."""
    made = isinstance(flow, nn.Module)
    if not callable(flow) or (made and not (hasattr(flow, "transform") and hasattr(flow, "base"))):
        raise TypeError(
            f"`flow` is a {type(flow).__name__}: expected a flow of zuko, with a transform and a "
            "base, or a class or function that makes one of a number of features, such as "
            "`zuko.flows.NSF`"
        )


def make_lazy(flow: Any, position: Tensor) -> nn.Module:
    """A flow of zuko for positions like this one, ``(dimension,)``.

    Raises:
        TypeError: If what was made is no flow of zuko.
        ValueError: If it is of another dimension, takes a context, or does not cover the real line.
    """
    lazy = flow if isinstance(flow, nn.Module) else flow(len(position))
    if not isinstance(lazy, nn.Module):
        raise TypeError(f"`flow` makes a {type(lazy).__name__}: expected a flow of zuko")
    refuse_other_flows(lazy)
    name = type(lazy).__name__
    lazy = lazy.to(position)
    base: Any = lazy.base(None)  # type: ignore[operator]
    if tuple(base.event_shape) != (len(position),):
        raise ValueError(
            f"`flow` {name} is of event shape {tuple(base.event_shape)}: expected "
            f"({len(position)},), one for each parameter"
        )
    try:
        lazy.transform(None).call_and_ladj(torch.zeros_like(position))  # type: ignore[operator]
    except RuntimeError as error:  # torch's, for shapes that do not fit
        raise ValueError(
            f"`flow` {name} has no density without a context: expected a flow of features alone"
        ) from error
    support = base.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    if support is not constraints.real:
        raise ValueError(
            f"`flow` {name} starts from {support}: expected a base on the whole real line, since "
            "it would never reach the rest of the posterior"
        )
    return lazy
