"""Layers that move one half of a vector, as the other half says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hamflow.networks.perceptron import perceptron

_STRETCH = 2.5  # the largest logarithm of a scale


class AffineCoupling(nn.Module):
    r"""Shifts and scales some coordinates by functions of the others.

    With *a* the coordinates that stay and *b* those that move,
    :math:`b' = b\, e^{s(a)} + t(a)`: inverse and volume are known in closed form. It begins as the
    identity.

    Arguments:
        dimension: Of the vectors; two at least.
        order: A permutation of the coordinates: the first half stays, the second moves.
        hidden: The widths of the hidden layers of the network that makes s and t.

    References:
        | Density estimation using Real NVP (Dinh et al., 2017)
        | https://arxiv.org/abs/1605.08803

    Example:
        >>> layer = AffineCoupling(3, torch.tensor([2, 0, 1]), (8,))
        >>> x = torch.randn(5, 3)
        >>> torch.allclose(layer.inverse(layer(x)[0])[0], x, atol=1e-6)
        True
    """

    order: Tensor
    back: Tensor

    def __init__(self, dimension: int, order: Tensor, hidden: Sequence[int]) -> None:
        super().__init__()
        self.num_fixed = dimension // 2
        self.register_buffer("order", order)
        self.register_buffer("back", order.argsort())
        moved = dimension - self.num_fixed
        self.network = perceptron(self.num_fixed, hidden, 2 * moved, last=0.0)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What stays, what moves, its shift and the logarithm of its scale."""
        fixed, moved = x[..., self.order].tensor_split([self.num_fixed], -1)
        shift, stretch = self.network(fixed).chunk(2, -1)
        return fixed, moved, shift, _STRETCH * torch.tanh(stretch / _STRETCH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors ``(*, dimension)`` moved, and the logarithm of the volume's growth, ``(*,)``."""
        fixed, moved, shift, stretch = self._split(x)
        moved = moved * stretch.exp() + shift
        return torch.cat([fixed, moved], -1)[..., self.back], stretch.sum(-1)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors moved back, and the logarithm of the volume's growth on the way back."""
        fixed, moved, shift, stretch = self._split(x)
        moved = (moved - shift) * (-stretch).exp()
        return torch.cat([fixed, moved], -1)[..., self.back], -stretch.sum(-1)


def couplings(dimension: int, count: int, hidden: Sequence[int]) -> nn.ModuleList:
    """Coupling layers in pairs that move each other's halves, which are split anew for each pair.

    Arguments:
        dimension: Of the vectors; of one coordinate there are no halves, and no layers.
        count: How many layers.
        hidden: The widths of their hidden layers.
    """
    layers = nn.ModuleList()
    generator = torch.Generator().manual_seed(0)
    for index in range(count if dimension > 1 else 0):
        if index % 2 == 0:
            order = torch.randperm(dimension, generator=generator)
        else:
            order = order.flip(0)
        layers.append(AffineCoupling(dimension, order, hidden))
    return layers
