"""Maps close to the identity, which carry one density to another near it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_hamflow.flows.coupling import couplings


class NearIdentity(nn.Module):
    r"""A map of the real line close to the identity, :math:`\mu + A\, T(A^{-1}(x - \mu))`.

    T is made of coupling layers, and of a shift and a scale for each coordinate. It begins as the
    identity.

    Arguments:
        loc: :math:`\mu`, of shape ``(dimension,)``.
        scale_tril: A, of shape ``(dimension, dimension)``.
        num_layers: How many coupling layers.
        hidden: The widths of the hidden layers of their networks.

    Example:
        >>> from pyro_hamflow.flows.near_identity import NearIdentity
        >>> flow = NearIdentity(torch.ones(2), torch.eye(2), 2, (8,))
        >>> position, growth = flow(torch.tensor([[0.5, 3.0]]))
        >>> position.detach(), growth.detach()
        (tensor([[0.5000, 3.0000]]), tensor([0.]))
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(
        self, loc: Tensor, scale_tril: Tensor, num_layers: int, hidden: Sequence[int]
    ) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.shift = nn.Parameter(torch.zeros_like(loc))
        self.stretch = nn.Parameter(torch.zeros_like(loc))
        self.layers = couplings(len(loc), num_layers, hidden).to(loc)

    def forward(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Positions ``(*, dimension)`` moved, and the log growth of volume, ``(*,)``."""
        centred = (position - self.loc).mT
        z = torch.linalg.solve_triangular(self.scale_tril, centred, upper=False).mT
        z, growth = z * self.stretch.exp() + self.shift, self.stretch.sum()
        for layer in self.layers:
            z, by_layer = layer(z)
            growth = growth + by_layer
        return self.loc + z @ self.scale_tril.mT, growth.expand(position.shape[:-1])
