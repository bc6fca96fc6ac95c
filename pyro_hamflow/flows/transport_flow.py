"""A map that a sampler can learn while it warms up: gradients of densities move through it too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor, nn

from pyro_hamflow.model.transported import Transport

_WIDTH = 32  # of a conditioner's hidden layer: 64 learned no more of a funnel of 101 dimensions
_HALVES = 4  # layers that move half of all coordinates by the others
# Logarithms of scales are linear up to the first, and bounded by the sum: without bounds, layers
# overflow one upon the other, and bent ones make a funnel's neck too wide.
_LINEAR, _BEYOND = 8.0, 2.0
_MOST_CUTS = 3  # of the coordinates in order, about which layers are made


class Layer(Transport, Protocol):
    """A map that takes gradients with it, and is called as modules are."""

    def __call__(self, z: Tensor, /) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` gives."""

    def pull(self, y: Tensor, gradient: Tensor, /) -> tuple[Tensor, Tensor]:
        """What came before moved rows, and the potential's gradient there, from that after."""


class TransportFlow(nn.Module):
    r"""Coupling layers between two that bend each coordinate, with N(0, I) at one end.

    A layer shifts and scales some coordinates by functions of the others, which have a linear part:
    logarithms of local scales are often linear in global parameters, and so are extrapolated
    rightly from few points. Which coordinates a layer holds fixed follows the sites: those of few
    elements first, for what is global has fewer than what is local. Layers that halve the
    coordinates at random do the rest. It begins as a shift and a scale;
    :func:`~pyro_hamflow.flows.transport_start.begin` finds the linear parts by least squares.

    :meth:`pull` takes a potential's gradients to the map's coordinates, without automatic
    differentiation, so that the Fisher divergence is trained on at little more than the cost of a
    log density.

    Arguments:
        sizes: How many coordinates each site has, in their order.

    Example:
        >>> flow = TransportFlow([1, 4])
        >>> z = torch.randn(3, 5)
        >>> torch.allclose(flow.inverse(flow(z)[0])[0], z, atol=1e-5)
        True
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        dimension = sum(sizes)
        layers: list[nn.Module] = [Bend(dimension)]
        generator = torch.Generator().manual_seed(0)
        for number in range(_HALVES if dimension > 1 else 0):
            if number % 2 == 0:
                order = torch.randperm(dimension, generator=generator)
                first, second = order.tensor_split(2)
            layers.append(Coupling(first, second))
            first, second = second, first
        for first, second in _cuts(sizes):
            layers += [Coupling(second, first, "globals"), Coupling(first, second, "locals")]
        self._layers = nn.ModuleList([*layers, Bend(dimension)])
        self.register_buffer("loc", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))

    @property
    def layers(self) -> list[Layer]:
        """What it is made of, from the coordinates on."""
        return cast(list[Layer], list(self._layers))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Positions from coordinates, and the logarithm of the volume's growth, ``(rows,)``."""
        log_volume = self.scale.log().sum()
        for layer in self.layers:
            z, growth = layer(z)
            log_volume = log_volume + growth
        return self.loc + self.scale * z, log_volume

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates from positions, and the logarithm of the volume's growth on the way back."""
        x, log_volume = (x - self.loc) / self.scale, -self.scale.log().sum()
        for layer in reversed(self.layers):
            x, growth = layer.inverse(x)
            log_volume = log_volume + growth
        return x, log_volume

    def pull(self, x: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates from positions, and the gradient of the moved density's potential there.

        Arguments:
            x: Positions, of shape ``(rows, dimension)``.
            gradient: The potential's gradient there.
        """
        x, gradient = (x - self.loc) / self.scale, self.scale * gradient
        for layer in reversed(self.layers):
            x, gradient = layer.pull(x, gradient)
        return x, gradient


class Coupling(nn.Module):
    r"""Shifts and scales some coordinates by functions of others.

    With *a* the coordinates that stay and *b* those that move, :math:`b' = b\, e^{s(a)} + t(a)`; s
    and t are the outputs of a perceptron of one hidden layer and a linear part, s within bounds. It
    begins as the identity.

    Arguments:
        fixed: The coordinates that stay, of shape ``(fixed,)``.
        moved: Those that move, ``(moved,)``; together they are all.
        moves: Which these are: any, or those of the sites before a cut, or after it.
    """

    fixed: Tensor
    moved: Tensor
    back: Tensor

    def __init__(
        self,
        fixed: Tensor,
        moved: Tensor,
        moves: Literal["halves", "globals", "locals"] = "halves",
    ) -> None:
        super().__init__()
        self.moves = moves
        self.register_buffer("fixed", fixed)
        self.register_buffer("moved", moved)
        self.register_buffer("back", torch.cat([fixed, moved]).argsort())
        inputs, outputs = len(fixed), 2 * len(moved)
        self.first = nn.Parameter(torch.randn(_WIDTH, inputs) / math.sqrt(inputs))
        self.bias = nn.Parameter(torch.zeros(_WIDTH))
        self.last = nn.Parameter(torch.zeros(outputs, _WIDTH))
        self.linear = nn.Parameter(torch.zeros(outputs, inputs))
        self.constant = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def add_linear(self, constants: Tensor, slopes: Tensor) -> None:
        """Adds a linear part to the shifts and the logarithms of the scales.

        Arguments:
            constants: Of shifts, then of logarithms, ``(2 moved,)``.
            slopes: Of both, along as many of the coordinates that stay, ``(some, 2 moved)``.
        """
        self.constant.add_(constants.to(self.constant))
        self.linear[:, : len(slopes)] += slopes.mT.to(self.linear) * math.sqrt(len(self.fixed))

    # Weights are counted in units of what many inputs add up to: learning rates suit all widths.
    @property
    def _last(self) -> Tensor:
        return self.last * (2.0 / math.sqrt(_WIDTH))

    @property
    def _linear(self) -> Tensor:
        return self.linear / math.sqrt(len(self.fixed))

    def _condition(self, a: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The hidden layer's slope, the shift, the logarithm of the scale and its slope.

        Hidden units grow linearly both ways, so that shifts are extrapolated as well as scales.
        """
        inner = a @ self.first.mT + self.bias
        hidden = torch.sqrt(1.0 + inner.square())
        output = hidden @ self._last.mT + a @ self._linear.mT + self.constant
        shift, stretch = output.tensor_split(2, -1)
        within = stretch.clamp(-_LINEAR, _LINEAR)
        beyond = torch.tanh((stretch - within) / _BEYOND)
        return inner / hidden, shift, within + _BEYOND * beyond, 1.0 - beyond.square()

    def _join(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([a, b], -1)[..., self.back]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x[..., self.fixed], x[..., self.moved]
        _, shift, log_scale, _ = self._condition(a)
        return self._join(a, b * log_scale.exp() + shift), log_scale.sum(-1)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y[..., self.fixed], y[..., self.moved]
        _, shift, log_scale, _ = self._condition(a)
        return self._join(a, (b - shift) * (-log_scale).exp()), -log_scale.sum(-1)

    def pull(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = y[..., self.fixed], y[..., self.moved]
        of_a, of_b = gradient[..., self.fixed], gradient[..., self.moved]
        slope, shift, log_scale, growth = self._condition(a)
        scale = log_scale.exp()
        before, of_before = (b - shift) / scale, of_b * scale
        of_stretch = (of_before * before - 1.0) * growth
        of_output = torch.cat([of_b, of_stretch], -1)
        of_a = of_a + ((of_output @ self._last) * slope) @ self.first
        of_a = of_a + of_output @ self._linear
        return self._join(a, before), self._join(of_a, of_before)


class Bend(nn.Module):
    r"""Bends each coordinate, smoothly and up to the tails.

    :math:`y = \sinh(\delta\, \mathrm{asinh}(z) + \epsilon)`: :math:`\epsilon` makes it skew, and
    far out :math:`|y|` grows as :math:`|z|^\delta`.

    Arguments:
        dimension: Of the vectors.

    References:
        | Sinh-arcsinh distributions (Jones and Pewsey, 2009)
        | https://doi.org/10.1093/biomet/asp053
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.skew = nn.Parameter(torch.zeros(dimension))
        self.log_tail = nn.Parameter(torch.zeros(dimension))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.sinh(self.log_tail.exp() * z.asinh() + self.skew)
        return y, self._growth(z, y)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        z = self._unbent(y)
        return z, -self._growth(z, y)

    def _unbent(self, y: Tensor) -> Tensor:
        return torch.sinh((y.asinh() - self.skew) * (-self.log_tail).exp())

    def _growth(self, z: Tensor, y: Tensor) -> Tensor:
        slopes = 0.5 * (torch.log1p(y.square()) - torch.log1p(z.square())) + self.log_tail
        return slopes.sum(-1)

    def pull(self, y: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        z = self._unbent(y)
        wide, narrow = torch.sqrt(1.0 + y.square()), torch.sqrt(1.0 + z.square())
        slope = self.log_tail.exp() * wide / narrow
        of_log_slope = slope * y / wide.square() - z / narrow.square()
        return z, gradient * slope - of_log_slope


def _cuts(sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Coordinates before and after a cut, of sites in the order of their sizes.

    There are as many cuts as are worth it: those where sizes grow most, and among equals the last.
    """
    order = sorted(range(len(sizes)), key=lambda site: sizes[site])
    starts = [sum(sizes[:site]) for site in range(len(sizes))]
    parts = [torch.arange(starts[site], starts[site] + sizes[site]) for site in order]
    growth = [len(parts[at]) / max(1, len(parts[at - 1])) for at in range(1, len(parts))]
    best = sorted(range(1, len(parts)), key=lambda at: (-growth[at - 1], -at))[:_MOST_CUTS]
    return [(torch.cat(parts[:at]), torch.cat(parts[at:])) for at in sorted(best)]
