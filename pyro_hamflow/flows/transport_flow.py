"""A map that a sampler can learn while it warms up: gradients of densities move through it too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_hamflow.flows.transport_layers import Bend, Coupling, Layer, Locals

_HALVES = 4  # layers that move half of all coordinates by the others
_MOST_CUTS = 3  # of the coordinates in order, about which layers are made


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
        generator, cuts = torch.Generator().manual_seed(0), _cuts(sizes)
        for number in range(_HALVES if dimension > 1 else 0):
            if number % 2 == 0:
                order = torch.randperm(dimension, generator=generator)
                first, second = order.tensor_split(2)
            layers.append(Coupling(first, second, "halves" if cuts else "any"))
            first, second = second, first
        for first, second in cuts:
            layers += [Coupling(second, first, "globals"), Locals(first, second)]
        self._layers = nn.ModuleList([*layers, Bend(dimension)])
        self.register_buffer("loc", torch.zeros(dimension))
        self.register_buffer("scale", torch.ones(dimension))

    @property
    def global_coordinates(self) -> Tensor:
        """Those that a layer scales others by, or all, of shape ``(globals,)``."""
        parts = [layer.fixed for layer in self._layers if isinstance(layer, Locals)]
        return torch.cat(parts or [torch.arange(len(self.loc))]).unique()

    @property
    def is_settled(self) -> bool:
        """Whether a prior of effects was set."""
        return any(bool(part.settled.any()) for part in self._layers if isinstance(part, Locals))

    def keep_settled(self) -> None:
        """Lets no training bend effects whose prior was set, nor what governs them."""
        outermost = cast(Bend, self._layers[-1])
        for layer in self._layers:
            if isinstance(layer, Locals) and layer.settled.any():
                outermost.settled[layer.fixed] = True
                outermost.settled[layer.moved[layer.settled]] = True

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
