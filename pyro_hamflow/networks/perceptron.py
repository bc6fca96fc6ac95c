r"""Learned energies whose gradients are written out.

A multilayer perceptron :math:`E(x) = w \cdot h_n`, :math:`h_i = \tanh(W_i h_{i-1} + b_i)`,
:math:`h_0 = x`, has the gradient

.. math:: \nabla E = W_1^\top g_1, \quad g_n = w \odot (1 - h_n^2), \quad
    g_{i-1} = (W_i^\top g_i) \odot (1 - h_{i-1}^2),

so that following it takes no automatic differentiation; and training through it, which
differentiates once more, takes two products with each matrix and two for each matrix's gradient.

It is written twice: in plain operations, which a compiler fuses and tracing sees through (what
samplers follow); and as a field whose derivative is written out too, which is what training without
a compiler wants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from pyro_hamflow.networks.fields import PerceptronField, tanh


class ScalarNetwork(nn.Module):
    """A multilayer perceptron from vectors to numbers, with its gradient in closed form.

    Arguments:
        dimension: Of the vectors.
        hidden: The widths of the hidden layers.
        outputs: How many outputs are summed.
        symmetric: Whether to make it even, the mean of its values at x and -x.

    Raises:
        ValueError: If there is no hidden layer.

    Example:
        >>> network = ScalarNetwork(2, (16, 16))
        >>> x = torch.randn(5, 2, requires_grad=True)
        >>> (by_autograd,) = torch.autograd.grad(network(x).sum(), x)
        >>> torch.allclose(network.field()(x), by_autograd, atol=1e-6)
        True
    """

    def __init__(
        self,
        dimension: int,
        hidden: Sequence[int] = (128, 128),
        *,
        outputs: int = 1,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if not hidden:
            raise ValueError("`hidden` is empty: expected the width of one layer or more")
        widths = (dimension, *hidden)
        self.symmetric = symmetric
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in zip(widths, widths[1:], strict=False)
        )
        self.last = nn.Parameter(torch.empty(outputs, widths[-1]))
        nn.init.uniform_(self.last, -(widths[-1] ** -0.5), widths[-1] ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """The energy of vectors ``(*, dimension)``, of shape ``(*,)``; no constant is added."""
        if self.symmetric:
            return 0.5 * (self._value(x) + self._value(-x))
        return self._value(x)

    def field(self, stiffness: Tensor | None = None) -> PerceptronField:
        """The energy's gradient at the present weights.

        Arguments:
            stiffness: As in :class:`~pyro_hamflow.networks.fields.PerceptronField`.
        """
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
        last = self.last.sum(0)
        return PerceptronField(weights, biases, last, stiffness, symmetric=self.symmetric)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient: in training to be derived again, else in plain operations."""
        if self.training:
            return self.field().energy_and_field(x)
        if not self.symmetric:
            return self._value_and_gradient(x)
        (value, gradient), (other, back) = self._value_and_gradient(x), self._value_and_gradient(-x)
        return 0.5 * (value + other), 0.5 * (gradient - back)

    def _value(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = tanh(layer(x))
        return x @ self.last.sum(0)

    def _value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        outputs = []
        for layer in layers:
            x = tanh(layer(x))
            outputs.append(x)
        last = self.last.sum(0)
        gradient = last
        for layer, output in zip(reversed(layers), reversed(outputs), strict=True):
            gradient = (gradient * (1.0 - output.square())) @ layer.weight
        return x @ last, gradient


class _Tanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return tanh(x)


def perceptron(inputs: int, hidden: Sequence[int], outputs: int, *, last: float) -> nn.Sequential:
    """A multilayer perceptron with hyperbolic tangents, whose outputs begin small.

    Arguments:
        inputs: How many there are.
        hidden: The widths of the hidden layers.
        outputs: How many there are.
        last: By what the last layer's first weights are multiplied; its biases are zero.
    """
    widths = (inputs, *hidden)
    layers: list[nn.Module] = []
    for before, after in zip(widths, widths[1:], strict=False):
        layers += [nn.Linear(before, after), _Tanh()]
    final = nn.Linear(widths[-1], outputs)
    with torch.no_grad():
        final.weight.mul_(last)
        final.bias.zero_()
    return nn.Sequential(*layers, final)
