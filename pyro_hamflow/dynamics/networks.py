r"""Learned energies whose gradients are written out.

A multilayer perceptron :math:`E(x) = w \cdot h_n`, :math:`h_i = \tanh(W_i h_{i-1} + b_i)`,
:math:`h_0 = x`, has the gradient

.. math:: \nabla E = W_1^\top g_1, \quad g_n = w \odot (1 - h_n^2), \quad
    g_{i-1} = (W_i^\top g_i) \odot (1 - h_{i-1}^2),

so that following it takes no automatic differentiation; and training through it, which
differentiates once more, takes two products with each matrix and two for each matrix's gradient.

It is written twice: in plain operations, energy included, which a compiler fuses and tracing sees
through (the samplers' learned potentials); and as one function whose derivative is written out too,
which is what training without a compiler wants (the flows).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


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
        >>> torch.allclose(network.gradient(x), by_autograd, atol=1e-6)
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

    def gradient(self, x: Tensor) -> Tensor:
        """The energy's gradient, of the shape of ``x``; can be differentiated once."""
        flat = x.reshape(-1, x.shape[-1])
        last = self.last.sum(0)
        weights = [part for layer in self.layers for part in (layer.weight, layer.bias)]
        if self.symmetric:
            there, back = _Gradient.apply(torch.cat([flat, -flat]), last, *weights).chunk(2)
            return (0.5 * (there - back)).reshape(x.shape)
        return _Gradient.apply(flat, last, *weights).reshape(x.shape)

    def value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient in plain operations, to batch, to trace or to differentiate."""
        if not self.symmetric:
            return self._value_and_gradient(x)
        (value, slope), (other, back) = self._value_and_gradient(x), self._value_and_gradient(-x)
        return 0.5 * (value + other), 0.5 * (slope - back)

    def _value(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x @ self.last.sum(0)

    def _value_and_gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        outputs = []
        for layer in layers:
            x = torch.tanh(layer(x))
            outputs.append(x)
        last = self.last.sum(0)
        slope = last
        for layer, output in zip(reversed(layers), reversed(outputs), strict=True):
            slope = (slope * (1.0 - output.square())) @ layer.weight
        return x @ last, slope


class _Gradient(torch.autograd.Function):
    """The gradient of the network, and the derivative of that, each product written once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, last: Tensor, *parameters: Tensor) -> Tensor:
        weights, biases = parameters[::2], parameters[1::2]
        outputs, slopes = [x], []
        for weight, bias in zip(weights, biases, strict=True):
            outputs.append(torch.addmm(bias, outputs[-1], weight.mT).tanh_())
            slopes.append(
                torch.addcmul(outputs[-1].new_ones(()), outputs[-1], outputs[-1], value=-1)
            )
        adjoints = [slopes[-1] * last]
        for weight, slope in zip(weights[:0:-1], slopes[-2::-1], strict=True):
            adjoints.append((adjoints[-1] @ weight).mul_(slope))
        adjoints.reverse()
        count = len(weights)
        ctx.save_for_backward(last, *weights, *outputs, *slopes, *adjoints)
        ctx.count = count
        return adjoints[0] @ weights[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        count = ctx.count
        last, *saved = ctx.saved_tensors
        weights, outputs = saved[:count], saved[count : 2 * count + 1]
        slopes, adjoints = saved[2 * count + 1 : 3 * count + 1], saved[3 * count + 1 :]
        # Along the adjoints, which the gradient was made of, from the first layer to the last.
        by_weight, bent = [], []
        incoming = cotangent
        for i in range(count):
            by_weight.append(adjoints[i].mT @ incoming)
            along = incoming @ weights[i].mT
            bent.append(along * adjoints[i])
            incoming = along.mul_(slopes[i])
        by_last = incoming.sum(0)
        # And back along the layers, whose slopes have changed with their inputs.
        by_parameters: list[Tensor] = []
        outgoing: Tensor | None = None
        for i in reversed(range(count)):
            change = bent[i].mul_(outputs[i + 1]) if outgoing is None else outgoing.mul_(slopes[i])
            if outgoing is None:
                change.mul_(-2.0)
            else:
                change.addcmul_(bent[i], outputs[i + 1], value=-2.0)
            by_weight[i].addmm_(change.mT, outputs[i])
            by_parameters[:0] = [by_weight[i], change.sum(0)]
            if i > 0 or ctx.needs_input_grad[0]:
                outgoing = change @ weights[i]
        return outgoing if ctx.needs_input_grad[0] else None, by_last, *by_parameters
