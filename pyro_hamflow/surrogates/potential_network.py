"""Potential energies that are learned: networks whose gradient is written out.

A sampler asks a learned energy for its gradient millions of times, and training asks for the
gradient's own derivative by the weights. Both are cheap if the gradient is a forward computation:
here the backward pass of the network is part of the network, so that sampling needs no autograd at
all, and training that matches gradients needs it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from pyro_hamflow import files
from pyro_hamflow.checks import whole
from pyro_hamflow.networks.perceptron import ScalarNetwork

_KIND = "potential network"  # what its files say that they hold
# What parameters were called in older files.
_FORMER_NAMES = {"shape": "quadratic", "slope": "linear"}


class PotentialNetwork(nn.Module):
    r"""A potential energy, a quadratic part plus a smooth multilayer perceptron.

    In whitened coordinates :math:`x = R^{-1} (z - c)` the energy is

    .. math:: V(z) = \tfrac12 \lVert A x \rVert^2 + b^\top x + \sum_k f_k(x, h),

    where f is a perceptron with hyperbolic tangents, bounded, so that far out the quadratic part
    alone decides and :math:`e^{-V}` can be normalised. Its outputs are summed: with as many as
    there are parameters, it is the latent form of the literature. The context h is held while z
    moves, and tells apart the posteriors of several data sets.

    Arguments:
        dimension: Of the positions.
        hidden: The widths of the hidden layers.
        outputs: How many outputs are summed.
        context_dimension: Of the context, which is empty by default.

    Raises:
        ValueError: If a size is no positive number.

    Invariant:
        The gradient is a function of the position alone, so that leapfrog steps along it preserve
        volume and are reversible, whatever the weights.

    References:
        | Efficient Bayesian inference with latent Hamiltonian neural networks in No-U-Turn Sampling
        | https://arxiv.org/abs/2208.06120

    Example:
        >>> network = PotentialNetwork(2)
        >>> value, gradient = network.value_and_gradient(torch.zeros(5, 2))
        >>> value.shape, gradient.shape
        (torch.Size([5]), torch.Size([5, 2]))
    """

    centre: Tensor
    root: Tensor
    inverse_root: Tensor
    context_centre: Tensor
    context_scale: Tensor
    reach: Tensor

    def __init__(
        self,
        dimension: int,
        *,
        hidden: Sequence[int] = (64, 64),
        outputs: int = 1,
        context_dimension: int = 0,
    ) -> None:
        super().__init__()
        sizes = [("dimension", dimension), ("outputs", outputs)]
        for name, size in [*sizes, *((f"hidden[{i}]", width) for i, width in enumerate(hidden))]:
            whole(name, size, 1)
        whole("context_dimension", context_dimension, 0)
        self.dimension = dimension
        self.hidden = tuple(hidden)
        self.outputs = outputs
        self.context_dimension = context_dimension
        self.network = ScalarNetwork(dimension + context_dimension, hidden, outputs=outputs)
        with torch.no_grad():  # small, so that training begins near the quadratic part
            self.network.last.mul_(0.1)
        self.quadratic = nn.Parameter(torch.eye(dimension))
        self.linear = nn.Parameter(torch.zeros(dimension))
        self.register_buffer("centre", torch.zeros(dimension))
        self.register_buffer("root", torch.eye(dimension))
        self.register_buffer("inverse_root", torch.eye(dimension))
        self.register_buffer("reach", torch.ones(()))
        self.register_buffer("context_centre", torch.zeros(context_dimension))
        self.register_buffer("context_scale", torch.ones(context_dimension))

    @torch.no_grad()
    def whiten_by(self, position: Tensor, context: Tensor | None = None) -> None:
        """Sets the whitened coordinates by positions that should have unit scale in them.

        The distance from the centre within which 99 of 100 of them lie is kept as ``reach``.

        Arguments:
            position: Of shape ``(points, dimension)``.
            context: Of shape ``(points, context_dimension)``.
        """
        count = len(position)
        centre = position.mean(0)
        covariance = (position - centre).mT @ (position - centre) / max(count - 1, 1)
        floor = 1e-6 * covariance.diag().mean() + torch.finfo(position.dtype).tiny
        root = torch.linalg.cholesky(covariance + floor * torch.eye(self.dimension).to(position))
        self.centre.copy_(centre)
        self.root.copy_(root)
        self.inverse_root.copy_(torch.linalg.inv(root))
        self.reach.copy_(self.whitened(position).square().sum(-1).quantile(0.99).sqrt())
        if context is not None and self.context_dimension:
            self.context_centre.copy_(context.mean(0))
            scale = context.std(0)
            self.context_scale.copy_(torch.where(scale > 0, scale, 1.0))

    def forget_whitening(self) -> None:
        """Takes positions to be in whitened coordinates from here on."""
        self.centre.zero_()
        self.root.copy_(torch.eye(self.dimension))
        self.inverse_root.copy_(self.root)

    def whitened(self, position: Tensor) -> Tensor:
        """The whitened coordinates x of positions."""
        return (position - self.centre) @ self.inverse_root.mT

    def value_and_gradient(
        self, position: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The energy and its gradient.

        Arguments:
            position: Of shape ``(*, dimension)``.
            context: Of shape ``(*, context_dimension)``; none if that is zero.

        Returns:
            Energies of shape ``(*)``; gradients of shape ``(*, dimension)``.
        """
        x = self.whitened(position)
        value, gradient = self.of_whitened(x, context)
        return value, gradient @ self.inverse_root

    def of_whitened(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The energy and its gradient by whitened coordinates.

        Arguments:
            x: Whitened coordinates, of shape ``(*, dimension)``.
            context: Of shape ``(*, context_dimension)``; none if that is zero.

        Raises:
            ValueError: If a context is missing.
        """
        stretched = x @ self.quadratic.mT
        inputs = x
        if self.context_dimension:
            if context is None:
                raise ValueError(
                    f"`context` is None: expected one of {self.context_dimension} numbers"
                )
            inputs = torch.cat([x, (context - self.context_centre) / self.context_scale], -1)
        value, gradient = self.network.value_and_gradient(inputs)
        value = value + 0.5 * stretched.square().sum(-1) + x @ self.linear
        return value, gradient[..., : self.dimension] + stretched @ self.quadratic + self.linear

    def given(self, context: Tensor) -> PotentialNetwork:
        """A network without a context, which is this one at a given context.

        Arguments:
            context: Of shape ``(context_dimension,)``.
        """
        network = PotentialNetwork(self.dimension, hidden=self.hidden, outputs=self.outputs)
        network = network.to(self.centre)
        weights = {k: v for k, v in self.state_dict().items() if not k.startswith("context")}
        first = cast(nn.Linear, self.network.layers[0])
        weight, bias = first.weight.detach(), first.bias.detach()
        scaled = (context.to(self.centre) - self.context_centre) / self.context_scale
        weights["network.layers.0.weight"] = weight[:, : self.dimension]
        weights["network.layers.0.bias"] = bias + weight[:, self.dimension :] @ scaled
        network.load_state_dict(weights, strict=False)
        return network

    def forward(self, position: Tensor, context: Tensor | None = None) -> Tensor:
        """The energy alone."""
        return self.value_and_gradient(position, context)[0]

    @property
    def sizes(self) -> dict[str, Any]:
        """What the network is made with."""
        return {
            "dimension": self.dimension,
            "hidden": list(self.hidden),
            "outputs": self.outputs,
            "context_dimension": self.context_dimension,
        }

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,  # noqa: FBT001, FBT002  # as torch calls it
        assign: bool = False,  # noqa: FBT001, FBT002
    ) -> Any:
        """Loads weights, under their present names or those of older files."""
        return super().load_state_dict(_renamed(state_dict), strict=strict, assign=assign)

    def save(self, path: str | Path) -> None:
        """Writes sizes and weights to a file."""
        files.save(path, _KIND, {"sizes": self.sizes, "weights": self.state_dict()})

    @classmethod
    def load(cls, path: str | Path) -> PotentialNetwork:
        """Reads a network that :meth:`save` wrote, in the precision that it was written in.

        Raises:
            FileFault: If the file is damaged, or holds something else.
        """
        return files.load(path, _KIND, cls.made_of_content)

    @classmethod
    def made_of_content(cls, content: Mapping[str, Any]) -> PotentialNetwork:
        """The network whose sizes and weights stand in a file."""
        sizes, weights = files.parts(content, ["sizes", "weights"])
        return files.restored(cls, sizes, _renamed(weights))


def _renamed(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Weights under their present names."""
    return {_FORMER_NAMES.get(name, name): part for name, part in weights.items()}
