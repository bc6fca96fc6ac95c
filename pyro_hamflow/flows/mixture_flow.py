"""A mixture of Gaussians bent by coupling layers, and what keeps its weights from growing."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_hamflow.flows.coupling import AffineCoupling
from pyro_hamflow.flows.energy import energy
from pyro_hamflow.flows.gaussian_mixture import GaussianMixture
from pyro_hamflow.flows.product_mixture import ProductMixture
from pyro_hamflow.flows.standardised import standardise
from pyro_hamflow.model.prior import Prior

_SHARE = 0.05  # of each defence
_FREEDOM = 4.0


class MixtureFlow(nn.Module):
    r"""A mixture of Gaussians moved by coupling layers, :math:`x = \mu + A\, T(z)`.

    A guide as :func:`~pyro_hamflow.fit_guide` wants it.

    Arguments:
        loc: The centre of its coordinates, of shape ``(dimension,)``.
        scale_tril: The unit of its coordinates, of shape ``(dimension, dimension)``.
        mixture: The distribution of z.
        layers: The coupling layers that T is made of.
    """

    loc: Tensor
    scale_tril: Tensor

    def __init__(
        self,
        loc: Tensor,
        scale_tril: Tensor,
        mixture: GaussianMixture | ProductMixture,
        layers: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.register_buffer("loc", loc)
        self.register_buffer("scale_tril", scale_tril)
        self.mixture, self.layers = mixture, layers

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.loc)}, {self.mixture.num_components} components, "
            f"{len(self.layers)} layers)"
        )

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: it knows its dimension."""

    def push(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Positions of points z, ``(*, dimension)``, and the log growth of volume, ``(*,)``."""
        growth = self.scale_tril.diagonal().log().sum()
        for layer in self.layers:
            z, by_layer = layer(z)
            growth = growth + by_layer
        return self.loc + z @ self.scale_tril.mT, growth

    def pull(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Points z of positions, and the log growth of volume on the way back."""
        z = standardise(position, self.loc, self.scale_tril)
        growth = -self.scale_tril.diagonal().log().sum()
        for layer in reversed(self.layers):
            z, by_layer = cast(AffineCoupling, layer).inverse(z)
            growth = growth + by_layer
        return z, growth

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)`` and their log density.

        Gradients flow through both to the layers, with the mixture held.
        """
        z = self.mixture.draw(num_samples)
        position, growth = self.push(z)
        return position, self.mixture.log_density(z).detach() - growth

    def log_ratio(self, position: Tensor) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``."""
        z, growth = self.pull(position)
        return self.mixture.log_density(z) + growth


class DefendedFlow(nn.Module):
    """A flow with small shares of wider distributions, which keep importance weights from growing.

    One share is the flow itself from Student's t instead of Gaussians. Another is the model's
    prior, over which no weight is larger than the likelihood's bound. A third is Student's t about
    each of the posterior's modes that are known, whatever the flow has learned of them.

    Arguments:
        flow: What is defended; what is trained further.
        prior: The model's; with none, there is no such share.
        modes: Gaussians about modes; with none, there is no such share.

    Example:
        >>> potential = Potential(lambda: pyro.sample("x", dist.Normal(0.0, 2.0)))
        >>> x = 2.0 * torch.randn(1000, 1)
        >>> flow = flow_for(potential, x, x / 4.0)
        >>> position, log_density = flow.draw(10)
        >>> torch.allclose(flow.log_ratio(position), log_density)
        True
    """

    def __init__(
        self, flow: MixtureFlow, prior: Prior | None = None, modes: GaussianMixture | None = None
    ) -> None:
        super().__init__()
        self.flow = flow
        self.prior = prior
        self.modes = modes

    def __repr__(self) -> str:
        modes = 0 if self.modes is None else self.modes.num_components
        return f"{type(self).__name__}({self.flow!r}, prior={self.prior is not None}, {modes=})"

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: it is made for one model and its arguments."""

    def draw(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Positions ``(num_samples, dimension)`` and their log density, ``(num_samples,)``."""
        flow = self.flow
        kind = torch.rand(num_samples, device=flow.loc.device)
        z = flow.mixture.draw(num_samples)
        heavy = kind < _SHARE
        if heavy.any():
            z[heavy] = flow.mixture.draw(int(heavy.sum()), _FREEDOM)
        position, _ = flow.push(z)
        wide = kind > 1.0 - _SHARE
        if self.prior is not None and wide.any():
            drawn, _ = self.prior.draw(int(wide.sum()))
            position = position.index_put((wide,), drawn)
        near = (kind > 1.0 - 2.0 * _SHARE) & ~wide
        if self.modes is not None and near.any():
            drawn = self.modes.draw(int(near.sum()), _FREEDOM)
            position = position.index_put((near,), drawn)
        return position, self.log_ratio(position)

    def log_ratio(self, position: Tensor) -> Tensor:
        """The log density of positions ``(positions, dimension)``, ``(positions,)``."""
        z, growth = self.flow.pull(position)
        mixture, defence = self.flow.mixture, math.log(_SHARE)
        shares = [mixture.log_density(z, _FREEDOM) + growth]
        if self.prior is not None:
            # Of the noise the parameters know nothing.
            noise = position.new_zeros(len(position), self.prior.potential.noise_dimension)
            value_of = partial(energy, self.prior) if torch.is_grad_enabled() else self.prior.value
            shares.append(-value_of(position, noise))
        if self.modes is not None:
            shares.append(self.modes.log_density(position, _FREEDOM))
        own = mixture.log_density(z) + growth + math.log1p(-len(shares) * _SHARE)
        return torch.logsumexp(torch.stack([own, *(share + defence for share in shares)]), 0)
